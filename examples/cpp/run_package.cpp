// Runs an AOTInductor package: a model compiled ahead of time, for inference. The package calls
// torch_ext's operators, so the program must have the library loaded before it opens the package;
// including torch_ext.h sees to that.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch_ext/torch_ext.h>

#include "example.h"

namespace {

constexpr const char* kUsage =
    "usage: run_package MODEL.pt2 RECENT.csv [FORECAST.csv]\n"
    "\n"
    "  MODEL.pt2     forecast.pt2 of examples/forecast_temperature.py\n"
    "  RECENT.csv    recent.csv of the same run: hourly values, oldest first\n"
    "  FORECAST.csv  forecast.csv of the same run, to compare with\n";

constexpr int64_t kHistory = 168; // hours that the model looks back

void run_package(const std::vector<std::string>& arguments) {
  if (arguments.size() < 2 || arguments.size() > 3) throw UserError(kUsage);
  check_readable(arguments[0]);
  const Table table = read_table(arguments[1]);
  const int64_t rows = table.values.size(0);
  if (rows < kHistory) throw UserError(arguments[1] + " has less than a week of hourly rows");

  const torch::InferenceMode no_gradients;
  torch::inductor::AOTIModelPackageLoader model(arguments[0]);
  const torch::Tensor week = table.values.narrow(0, rows - kHistory, kHistory).unsqueeze(0);
  const torch::Tensor forecast = model.run({week})[0];
  print_forecast(forecast, table.dates.back());

  if (arguments.size() > 2) {
    const torch::Tensor expected = read_table(arguments[2]).values.flatten();
    if (expected.numel() != forecast.numel()) {
      throw UserError(arguments[2] + " does not have as many hours as the forecast");
    }
    const double difference = (forecast.flatten() - expected).abs().max().item<double>();
    std::printf("largest difference to %s: %.1e\n", arguments[2].c_str(), difference);
    if (!(difference < 1e-2)) throw UserError("the package and Python disagree");
  }

  for (const int64_t batch : {1, 64}) {
    const torch::Tensor weeks = week.expand({batch, -1, -1}).contiguous();
    constexpr int kCalls = 20;
    model.run({weeks});
    const Stopwatch watch;
    for (int i = 0; i < kCalls; ++i) model.run({weeks});
    std::printf(
        "batch of %lld weeks: %.2f ms\n", static_cast<long long>(batch),
        watch.seconds() * 1e3 / kCalls);
  }
}

} // namespace

int main(int argc, char** argv) { return run_program(argc, argv, kUsage, run_package); }
