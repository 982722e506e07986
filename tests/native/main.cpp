// kernel_tests [rounds] [tier ...]: every kernel on the named tiers (all that run here) against the scalar tier. With
// tiers named, all must run here and the last one must be the one that is chosen. Exit status 1 on a difference, 2 for a
// tier that does not run or is not chosen.
#include <cstdio>

#include "check.h"

namespace narrowcast::test {
namespace {

std::vector<std::string>& tier_list() {
  static std::vector<std::string> list;
  return list;
}

int failure_count = 0;

struct Test {
  const char* name;
  void (*body)(Random&);
  int rounds_in_thousand;  // of the wanted rounds: slow tests run fewer
};

constexpr Test kTests[] = {
    {"quantize", test_quantize, 1000},         {"linear_int8", test_linear_int8, 500},
    {"linear_lowbit", test_linear_lowbit, 500},    {"expand", test_expand, 1000},
    {"interleaved", test_interleaved, 500},
    {"convolution", test_conv, 500},           {"recurrent", test_recurrent, 100},
    {"network", test_network, 1000},           {"encode", test_encode, 1000},
};

}  // namespace

const std::vector<std::string>& tiers() { return tier_list(); }
int failures() { return failure_count; }

void report(const std::string& what, const std::string& message) {
  if (++failure_count <= 20) std::printf("FAILED %s: %s\n", what.c_str(), message.c_str());
}

int run(int64_t rounds, const std::vector<std::string>& wanted) {
  tier_list() = {"scalar"};
  for (const char* name : {"avx2", "avxvnni", "avx512vnni", "neondot", "neoni8mm"}) {
    const char* missing = narrowcast_isa_missing(name);
    if (missing[0] == '\0') tier_list().push_back(name);
    std::printf("  %s: %s\n", name, missing[0] == '\0' ? "runs here" : missing);
  }
  for (const std::string& name : wanted) {
    const char* missing = narrowcast_isa_missing(name.c_str());
    if (missing != nullptr && missing[0] == '\0') continue;
    std::printf("tier %s cannot run here: %s\n", name.c_str(), missing == nullptr ? "no such tier" : missing);
    return 2;
  }
  if (!wanted.empty() && wanted.back() != narrowcast_isa()) {
    std::printf("expected tier %s to be chosen\n", wanted.back().c_str());
    return 2;
  }
  if (!wanted.empty()) {
    tier_list() = {"scalar"};
    for (const std::string& name : wanted) {
      if (name != "scalar") tier_list().push_back(name);
    }
  }
  for (const Test& test : kTests) {
    const int before = failure_count;
    const int64_t count = rounds * test.rounds_in_thousand / 1000 + 1;
    for (int64_t round = 0; round < count; ++round) {
      Random random(static_cast<uint64_t>(round) + 1);
      test.body(random);
    }
    std::printf("%s: %lld rounds, %s\n", test.name, static_cast<long long>(count),
                failure_count == before ? "equal" : "DIFFERENT");
    std::fflush(stdout);
  }
  return failure_count == 0 ? 0 : 1;
}

}  // namespace narrowcast::test

int main(int count, char** arguments) {
  const int64_t rounds = count > 1 ? std::atoll(arguments[1]) : 300;
  std::printf("chosen: %s\n", narrowcast_isa());
  return narrowcast::test::run(rounds, std::vector<std::string>(arguments + (count > 2 ? 2 : count), arguments + count));
}
