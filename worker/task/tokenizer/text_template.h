// worker/task/tokenizer/text_template.h
//
// Jinja templates of prompts, rendered by the Rust bridge (minijinja) with the fields of one row: white space stays as it is
// written, Python's string methods work, and a field that the row lacks is an error.
//
// Threads: const methods are thread-safe.

#pragma once

#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "common/status.h"

namespace refinery::tokenizer {

class TextTemplate {
 public:
  // INVALID_ARGUMENT with the template engine's words for a syntax error.
  static StatusOr<std::shared_ptr<const TextTemplate>> Compile(const std::string& source);
  ~TextTemplate();
  TextTemplate(const TextTemplate&) = delete;
  TextTemplate& operator=(const TextTemplate&) = delete;

  // `variables` is an object. INVALID_ARGUMENT for a missing variable or a failing expression.
  StatusOr<std::string> Render(const nlohmann::json& variables) const;

 private:
  struct Impl;
  explicit TextTemplate(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace refinery::tokenizer
