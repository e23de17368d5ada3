# The commands that people type. Everything else is CMake (see CMakePresets.json).
.PHONY: demo test simulate sanitize test-malformed fuzz parity bench-model bench-eval bench-quantize bench-coordinator reliability install install-model build programs clean

PRESET ?= dev
BUILD := build/$(PRESET)
export CCACHE_SLOPPINESS := pch_defines,time_macros
export CCACHE_MAXSIZE ?= 10G
# The same source in another folder is the same source.
export CCACHE_BASEDIR ?= $(CURDIR)
export CCACHE_NOHASHDIR ?= 1

# The main job on a real model, from a fresh machine to a report.
demo: install-model programs
	$(BUILD)/bin/refinery data pull arc_easy
	$(BUILD)/bin/refinery run deploy/recipes/demo.yaml

# Every test that needs no GPU.
test: install-model build test-malformed
	ctest --test-dir $(BUILD) --output-on-failure --no-tests=error -j2

# Malformed files under AddressSanitizer and UndefinedBehaviorSanitizer: some thousand inputs, each read or refused in time.
test-malformed:
	cmake --preset asan
	cmake --build build/asan --target fuzz_replays
	ctest --test-dir build/asan -L fuzz --output-on-failure --no-tests=error -j1

# The coordinator's core under a simulated fleet, as many seeds as wanted (docs/simulation.md).
SEEDS ?= 1..100000
simulate: $(BUILD)/build.ninja
	cmake --build $(BUILD) --target refinery_simulation
	$(BUILD)/bin/refinery_simulation --seeds $(SEEDS)

# Coordinator, agent, client, simulation and reliability programs under ThreadSanitizer, then AddressSanitizer and
# UndefinedBehaviorSanitizer; any report fails. About 25 minutes of two cores to build, 15 to run (docs/reliability.md).
SANITIZERS ?= tsan asan_services
sanitize:
	tests/sanitize/run.sh $(SANITIZERS)

# libFuzzer without end on one format: make fuzz FORMAT=gguf (safetensors, tokenizer, template, model_folder, peft, table).
FORMAT ?= gguf
fuzz:
	cmake --preset fuzz
	cmake --build build/fuzz --target $(FORMAT)_fuzz
	mkdir -p build/fuzz/corpus/$(FORMAT)
	ASAN_OPTIONS=detect_leaks=0 build/fuzz/bin/$(FORMAT)_fuzz -timeout=10 -rss_limit_mb=2048 build/fuzz/corpus/$(FORMAT) tests/fuzz/corpus/$(FORMAT)

# Comparisons with the live Python peers in a virtual environment of their own.
parity: install-model build
	tests/parity/run.sh $(BUILD)

# The generation engine beside transformers and llama.cpp: a row per point, fails where a bound is missed.
bench-model: install-model $(BUILD)/build.ninja
	cmake --build $(BUILD) --target refinery_model_benchmark
	tests/bench/run.sh model_bench.py --programs $(BUILD)/bin

# Speed and exactness of evaluation against lm-evaluation-harness, in a virtual environment of its own; needs ../shared/data.
bench-eval: install-model programs
	cmake --build $(BUILD) --target eval_test data_test
	tests/bench/run.sh eval_bench.py --build $(BUILD)

# Quantization and recovery against GPTQModel, in the environment of `make parity`; needs ../shared/data. An hour or more.
bench-quantize: install-model programs
	cmake --build $(BUILD) --target refinery_quantize_benchmark refinery_recover_benchmark
	PYTHONPATH=tests/bench "$$(tests/parity/environment.sh)/bin/python" tests/bench/quantize_bench.py --programs $(BUILD)/bin

# The coordinator under load: durable completions, leases for a thousand workers, restart, watchers; fails where a bound is missed.
bench-coordinator: $(BUILD)/build.ninja
	cmake --build $(BUILD) --target refineryd refinery_coordinator_benchmark
	$(BUILD)/bin/refinery_coordinator_benchmark

# The coordinator's promises with real lease times: 200 kill -9, 20 s away, lost workers, every failpoint, lost blobs, a full disk.
reliability: $(BUILD)/build.ninja
	cmake --build $(BUILD) --target refinery_reliability
	$(BUILD)/bin/refinery_reliability --full

install:
	deploy/install_dependencies.sh

install-model:
	deploy/install_dependencies.sh model

build: $(BUILD)/build.ninja
	cmake --build $(BUILD)

programs: $(BUILD)/build.ninja
	cmake --build $(BUILD) --target refineryd refinery-worker refinery-task refinery

$(BUILD)/build.ninja:
	cmake --preset $(PRESET)

clean:
	rm -rf build
