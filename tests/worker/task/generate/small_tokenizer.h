// tests/worker/task/generate/small_tokenizer.h
//
// The small byte-level tokenizers of tests/vectors/tokenizer (256 bytes, some merges, special tokens) as tokenizer folders.

#pragma once

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <memory>
#include <string>

#include "worker/task/checkpoint/gguf_tokenizer.h"
#include "worker/task/tokenizer/tokenizer.h"

namespace refinery::testing {

class SmallTokenizer {
 public:
  explicit SmallTokenizer(const std::string& name) {
    namespace fs = std::filesystem;
    const auto file = checkpoint::GgufFile::Open(fs::path(REFINERY_SOURCE_DIR) / "tests/vectors/tokenizer" / (name + ".gguf"));
    const auto files = checkpoint::TokenizerFromGguf(**file);
    folder_ = fs::temp_directory_path() / ("refinery_small_tokenizer." + std::to_string(::getpid()) + "." + name);
    fs::create_directories(folder_);
    std::ofstream(folder_ / "tokenizer.json") << files->tokenizer_json;
    std::ofstream(folder_ / "tokenizer_config.json") << files->tokenizer_config_json;
    tokenizer_ = *tokenizer::Tokenizer::Load(folder_);
  }
  ~SmallTokenizer() { std::filesystem::remove_all(folder_); }
  SmallTokenizer(const SmallTokenizer&) = delete;
  SmallTokenizer& operator=(const SmallTokenizer&) = delete;

  const std::shared_ptr<const tokenizer::Tokenizer>& get() const { return tokenizer_; }

 private:
  std::filesystem::path folder_;
  std::shared_ptr<const tokenizer::Tokenizer> tokenizer_;
};

}  // namespace refinery::testing
