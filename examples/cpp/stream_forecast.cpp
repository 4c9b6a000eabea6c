// Streams hourly values through a TorchScript forecast model, one step at a time, for as long as one
// likes, in constant memory: what a server or a measuring station does.
//
// The model is the one that examples/forecast_temperature.py saves. Its methods:
//   init_state(batch_size) -> state
//   step(x_t (B, 5), state) -> (forecast of the next 24 hours (B, 24), state)
//   forward(history (B, T, 5)) -> (B, 24)
#include <torch/script.h>
#include <torch_ext/torch_ext.h> // keeps the operators linked that the model calls

#include "example.h"

namespace {

constexpr const char* kUsage =
    "usage: stream_forecast MODEL.ts RECENT.csv [HOURS]\n"
    "\n"
    "  MODEL.ts    forecast.ts of examples/forecast_temperature.py\n"
    "  RECENT.csv  recent.csv of the same run: hourly values, oldest first\n"
    "  HOURS       how long to stream on, the values repeated (default 100000: eleven years)\n";

constexpr int64_t kHistory = 168;    // hours that the model was trained to look back
constexpr double kAllowedGrowth = 4; // MiB between a warm program and its end

void stream_forecast(const std::vector<std::string>& arguments) {
  if (arguments.size() < 2 || arguments.size() > 3) throw UserError(kUsage);
  const std::string model_path = arguments[0], values_path = arguments[1];
  const int64_t hours = arguments.size() > 2 ? positive_number(arguments[2], "HOURS") : 100000;
  check_readable(model_path);
  const Table table = read_table(values_path);
  const int64_t rows = table.values.size(0);
  if (rows < kHistory) throw UserError(values_path + " has less than a week of hourly rows");

  const torch::InferenceMode no_gradients;
  torch::jit::Module model = torch::jit::load(model_path);
  model.eval();
  for (const char* method : {"init_state", "step"}) {
    if (!model.find_method(method)) {
      throw UserError(model_path + " has no method " + method + ", so it cannot stream");
    }
  }
  const auto step = model.get_method("step");
  torch::IValue state;
  torch::Tensor forecast;
  const auto feed = [&](int64_t row) {
    const auto result = step({table.values.narrow(0, row % rows, 1), state}).toTuple();
    forecast = result->elements()[0].toTensor();
    state = result->elements()[1];
  };

  // A week in steps is the same as the week in one call.
  state = model.get_method("init_state")({int64_t(1)});
  for (int64_t row = rows - kHistory; row < rows; ++row) feed(row);
  const torch::Tensor week = table.values.narrow(0, rows - kHistory, kHistory).unsqueeze(0);
  const torch::Tensor in_one_call = model.forward({week}).toTensor();
  const double difference = (forecast - in_one_call).abs().max().item<double>();
  print_forecast(forecast, table.dates.back());
  std::printf("largest difference to the same week in one call: %.1e\n\n", difference);
  if (!(difference < 1e-2)) throw UserError("steps and one call disagree");

  std::printf("streaming %lld hours\n", static_cast<long long>(hours));
  std::printf("%12s %18s %14s\n", "hour", "microseconds/step", "resident MiB");
  const int64_t report = std::max<int64_t>(hours / 10, 1);
  double warm = 0;
  Stopwatch watch;
  for (int64_t hour = 1; hour <= hours; ++hour) {
    feed(hour - 1);
    if (hour % report == 0 || hour == hours) {
      const double micros = watch.seconds() * 1e6 / double(hour);
      std::printf("%12lld %18.1f %14.1f\n", static_cast<long long>(hour), micros, resident_mib());
      std::fflush(stdout);
      if (warm == 0) warm = resident_mib();
    }
  }
  if (!forecast.isfinite().all().item<bool>()) throw UserError("the forecast is not finite");
  const double growth = resident_mib() - warm;
  std::printf("memory grew by %.1f MiB over the last nine tenths\n", growth);
  if (growth > kAllowedGrowth) throw UserError("memory grows while streaming");
}

} // namespace

int main(int argc, char** argv) { return run_program(argc, argv, kUsage, stream_forecast); }
