// What the programs share: errors as sentences, the table of hourly values, time and memory.
#pragma once
#include <torch/types.h>

#include <chrono>
#include <cstdio>
#include <exception>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>
#ifdef __linux__
#include <sys/resource.h>
#include <unistd.h>
#endif

// Something the user can mend.
struct UserError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Calls run(arguments) and turns what it throws into one sentence and exit status 1. torch's errors
// carry a stack trace after their first line, which helps no user.
template <class Run>
int run_program(int argc, char** argv, const char* usage, Run run) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  if (!arguments.empty() && (arguments[0] == "-h" || arguments[0] == "--help")) {
    std::fputs(usage, stdout);
    return 0;
  }
  try {
    run(arguments);
    return 0;
  } catch (const UserError& error) {
    std::fprintf(stderr, "%s: %s\n", argv[0], error.what());
  } catch (const c10::Error& error) {
    const std::string text = error.what_without_backtrace();
    std::fprintf(stderr, "%s: torch says: %s\n", argv[0], text.substr(0, text.find('\n')).c_str());
  } catch (const std::exception& error) {
    const std::string text = error.what();
    std::fprintf(stderr, "%s: %s\n", argv[0], text.substr(0, text.find('\n')).c_str());
  }
  return 1;
}

inline int64_t positive_number(const std::string& text, const char* what) {
  size_t end = 0;
  int64_t number = 0;
  try {
    number = std::stoll(text, &end);
  } catch (const std::exception&) {
  }
  if (end != text.size() || number < 1) {
    throw UserError(std::string(what) + " is \"" + text + "\", expected a positive whole number");
  }
  return number;
}

inline void check_readable(const std::string& path) {
  if (!std::ifstream(path).good()) throw UserError("the file " + path + " cannot be opened");
}

// A CSV file of a date and numbers: the numbers (rows, columns), and the dates.
struct Table {
  torch::Tensor values;
  std::vector<std::string> dates;
};

inline Table read_table(const std::string& path) {
  check_readable(path);
  std::ifstream file(path);
  std::string line, cell;
  std::getline(file, line); // names
  Table table;
  std::vector<float> values;
  while (std::getline(file, line)) {
    if (line.empty()) continue;
    std::istringstream cells(line);
    std::getline(cells, cell, ',');
    table.dates.push_back(cell);
    while (std::getline(cells, cell, ',')) {
      try {
        values.push_back(std::stof(cell));
      } catch (const std::exception&) {
        throw UserError("\"" + cell + "\" in " + path + " is not a number");
      }
    }
    if (values.size() % table.dates.size() != 0) {
      throw UserError("the rows of " + path + " do not have equally many numbers");
    }
  }
  if (values.empty()) throw UserError(path + " has no rows");
  table.values = torch::tensor(values).view({int64_t(table.dates.size()), -1});
  return table;
}

inline void print_forecast(const torch::Tensor& hours, const std::string& last_date) {
  std::printf("after %s, degrees Celsius:", last_date.c_str());
  const torch::Tensor flat = hours.flatten().contiguous();
  for (int64_t i = 0; i < flat.numel(); ++i) {
    std::printf("%s%6.1f", i % 12 == 0 ? "\n  " : " ", flat[i].item<float>());
  }
  std::printf("\n");
}

class Stopwatch {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// The memory that the program occupies now, in MiB; 0 where that is not known.
inline double resident_mib() {
#ifdef __linux__
  long pages = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> pages >> resident;
  return double(resident) * double(sysconf(_SC_PAGESIZE)) / (1 << 20);
#else
  return 0;
#endif
}

// The most memory that the program has occupied so far, in MiB; 0 where that is not known.
inline double peak_mib() {
#ifdef __linux__
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return double(usage.ru_maxrss) / 1024;
#else
  return 0;
#endif
}
