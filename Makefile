# The commands that people type. Everything else is CMake (see CMakePresets.json).
.PHONY: demo test parity install install-model build programs clean

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
test: install-model build
	ctest --test-dir $(BUILD) --output-on-failure --no-tests=error -j1

# Comparisons with the live Python peers in a virtual environment of their own.
parity: install-model build
	tests/parity/run.sh $(BUILD)

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
