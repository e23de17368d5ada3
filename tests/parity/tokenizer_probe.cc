// The tokenizer library as a filter, for tests/parity/tokenizer_peers.py:
//   tokenizer_probe gguf FILE FOLDER    writes the tokenizer.json and tokenizer_config.json of a GGUF file
//   tokenizer_probe encode FOLDER       a JSON text a line -> [ids, text of the ids] a line
//   tokenizer_probe render FOLDER       {"messages": [...], ...} a line -> {"text": ...} or {"error": ...} a line
#include "worker/task/runtime/torch.h"
//
#include <filesystem>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>

#include "worker/task/checkpoint/gguf_tokenizer.h"
#include "worker/task/tokenizer/tokenizer.h"

namespace refinery {
namespace {

using nlohmann::ordered_json;

Status WriteFromGguf(const std::filesystem::path& file, const std::filesystem::path& folder) {
  RF_ASSIGN_OR_RETURN(std::shared_ptr<const checkpoint::GgufFile> gguf, checkpoint::GgufFile::Open(file));
  RF_ASSIGN_OR_RETURN(checkpoint::TokenizerFiles files, checkpoint::TokenizerFromGguf(*gguf));
  std::filesystem::create_directories(folder);
  std::ofstream(folder / "tokenizer.json") << files.tokenizer_json;
  std::ofstream(folder / "tokenizer_config.json") << files.tokenizer_config_json;
  return absl::OkStatus();
}

StatusOr<ordered_json> Encode(const tokenizer::Tokenizer& tokenizer, const ordered_json& text) {
  RF_ASSIGN_OR_RETURN(std::vector<int32_t> ids, tokenizer.Encode(text.get<std::string>()));
  RF_ASSIGN_OR_RETURN(std::string decoded, tokenizer.Decode(ids));
  return ordered_json::array({ids, decoded});
}

ordered_json Render(const tokenizer::Tokenizer& tokenizer, const ordered_json& request) {
  tokenizer::ChatOptions options;
  options.tools = request.value("tools", ordered_json());
  options.documents = request.value("documents", ordered_json());
  options.continue_final_message = request.value("continue_final_message", false);
  const ordered_json variables = request.value("variables", ordered_json::object());
  for (const auto& [name, value] : variables.items()) options.variables[name] = value;
  StatusOr<std::string> text =
      tokenizer.RenderChat(request["messages"], request.value("add_generation_prompt", false), options);
  if (!text.ok()) return {{"error", std::string(text.status().message())}};
  return {{"text", *text}};
}

Status Run(std::string_view mode, const std::filesystem::path& folder) {
  RF_ASSIGN_OR_RETURN(std::shared_ptr<const tokenizer::Tokenizer> tokenizer, tokenizer::Tokenizer::Load(folder));
  for (std::string line; std::getline(std::cin, line);) {
    ordered_json input = ordered_json::parse(line), output;
    if (mode == "render") {
      output = Render(*tokenizer, input);
    } else {
      RF_ASSIGN_OR_RETURN(output, Encode(*tokenizer, input));
    }
    std::cout << output.dump() << "\n";
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace refinery

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  const bool gguf = arguments.size() == 3 && arguments[0] == "gguf";
  if (!gguf && (arguments.size() != 2 || (arguments[0] != "encode" && arguments[0] != "render"))) {
    std::cerr << "usage: tokenizer_probe gguf FILE FOLDER | encode FOLDER | render FOLDER\n";
    return 2;
  }
  refinery::Status status = gguf ? refinery::WriteFromGguf(arguments[1], arguments[2])
                                 : refinery::Run(arguments[0], arguments[1]);
  if (!status.ok()) std::cerr << status.message() << "\n";
  return status.ok() ? 0 : 1;
}
