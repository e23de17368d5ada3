#!/usr/bin/env bash
# Builds the coordinator, the agent, the client and their tests with sanitizers and runs them; any report, also of a process that a test
# started, fails.
#
#   tests/sanitize/run.sh                       ThreadSanitizer, then AddressSanitizer with UndefinedBehaviorSanitizer
#   tests/sanitize/run.sh tsan|asan_services    one of them
#
# SANITIZE_TESTS=REGEX runs some of the tests, SANITIZE_RELIABILITY="kills away" some of the reliability programs ("" = none).
set -euo pipefail
cd "$(dirname "$0")/../.."

readonly tests=${SANITIZE_TESTS:-.}
readonly reliability=${SANITIZE_RELIABILITY-kills away lost_workers bad_network partition stale_commits failpoints blob_loss}

failed=0
for preset in "${@:-tsan asan_services}"; do
  for one in $preset; do
    build=$PWD/build/$one reports=$PWD/build/$one/reports
    cmake --preset "$one" >/dev/null
    cmake --build "$build"
    rm -rf "$reports"
    mkdir -p "$reports"
    export TSAN_OPTIONS="suppressions=$PWD/tests/sanitize/tsan.supp:log_path=$reports/thread:history_size=4:second_deadlock_stack=1"
    export ASAN_OPTIONS="log_path=$reports/address:detect_stack_use_after_return=1:strict_init_order=1:check_initialization_order=1"
    export UBSAN_OPTIONS="log_path=$reports/undefined:print_stacktrace=1"
    export OMP_NUM_THREADS=1
    ctest --test-dir "$build" -R "$tests" -E '^(reliability_test|tidy_test|deploy_test)$' --output-on-failure --no-tests=error -j1 || failed=1
    if [ -n "$reliability" ]; then
      # shellcheck disable=SC2086
      "$build/bin/refinery_reliability" $reliability || failed=1
    fi
    count=$(find "$reports" -type f -size +0 | wc -l)
    printf '%s: %s reports\n' "$one" "$count"
    if [ "$count" -gt 0 ]; then
      find "$reports" -type f -size +0 -exec head -n 80 {} +
      failed=1
    fi
  done
done
exit $failed
