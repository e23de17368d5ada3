// GGUF: opens the file, dequantizes its tensors, rebuilds configuration and tokenizer, writes the model's folder.
#include "worker/task/runtime/torch.h"
//
#include <cstring>

#include "common/files.h"
#include "tests/fuzz/fuzz_target.h"
#include "worker/task/checkpoint/gguf.h"
#include "worker/task/checkpoint/gguf_model.h"
#include "worker/task/checkpoint/gguf_tokenizer.h"

namespace refinery::fuzz {

const char kFormat[] = "gguf";
const TextKind kTextKind = TextKind::kNone;

namespace {

constexpr int64_t kMaxElements = 1 << 20;   // the input is small; what it claims is not

// Writes a GGUF file and notes where its numbers stand.
class Builder {
 public:
  template <typename T>
  void Number(T value) {
    seed_.fields.push_back({seed_.bytes.size(), sizeof(T)});
    seed_.bytes.append(reinterpret_cast<const char*>(&value), sizeof(T));
  }
  void Text(std::string_view text) {
    Number<uint64_t>(text.size());
    seed_.bytes += text;
  }
  void Strings(std::string_view key, const std::vector<std::string>& items) {
    Text(key);
    Number<uint32_t>(9);
    Number<uint32_t>(8);
    Number<uint64_t>(items.size());
    for (const std::string& item : items) Text(item);
  }
  void String(std::string_view key, std::string_view value) {
    Text(key);
    Number<uint32_t>(8);
    Text(value);
  }
  void Int(std::string_view key, uint32_t value) {
    Text(key);
    Number<uint32_t>(4);
    Number<uint32_t>(value);
  }
  void Tensor(std::string_view name, const std::vector<uint64_t>& sizes, uint32_t type, uint64_t offset) {
    Text(name);
    Number<uint32_t>(static_cast<uint32_t>(sizes.size()));
    for (uint64_t size : sizes) Number<uint64_t>(size);
    Number<uint32_t>(type);
    Number<uint64_t>(offset);
  }
  Seed Take(const std::string& name, size_t data_bytes) {
    seed_.name = name;
    seed_.bytes.resize((seed_.bytes.size() + 31) / 32 * 32 + data_bytes, '\x11');
    return std::move(seed_);
  }
  void Raw(std::string_view text) { seed_.bytes += text; }

 private:
  Seed seed_;
};

Seed Small() {
  Builder b;
  b.Raw("GGUF");
  b.Number<uint32_t>(3);
  b.Number<uint64_t>(2);   // tensors
  b.Number<uint64_t>(6);   // metadata
  b.String("general.architecture", "llama");
  b.Int("general.alignment", 32);
  b.String("tokenizer.ggml.model", "gpt2");
  b.Strings("tokenizer.ggml.tokens", {"a", "b", "ab"});
  b.Strings("tokenizer.ggml.merges", {"a b"});
  b.Text("some.floats");
  b.Number<uint32_t>(9);
  b.Number<uint32_t>(6);
  b.Number<uint64_t>(2);
  b.Number<float>(1.5F);
  b.Number<float>(-0.0F);
  b.Tensor("token_embd.weight", {32, 3}, 8, 0);   // Q8_0
  b.Tensor("output_norm.weight", {8}, 0, 128);    // F32
  return b.Take("small", 160);
}

// A whole model, so that what comes after the container is reached: its numbers are found by the random flips only.
Seed WholeModel() {
  Seed seed{.name = "tiny.gguf"};
  auto bytes = ReadFile(std::filesystem::path(REFINERY_SOURCE_DIR) / "tests/vectors/gguf/tiny.gguf");
  if (bytes.ok()) seed.bytes = *bytes;
  for (size_t offset : {4, 8, 16, 24}) seed.fields.push_back({offset, offset == 4 ? size_t{4} : size_t{8}});
  // The lengths of keys, values and names stand before texts: every 8 bytes that are a small number before a letter.
  for (size_t at = 24; at + 9 < std::min<size_t>(seed.bytes.size(), 12'000) && seed.fields.size() < 120; ++at) {
    uint64_t value = 0;
    std::memcpy(&value, seed.bytes.data() + at, 8);
    if (value > 3 && value < 40 && isalpha(static_cast<unsigned char>(seed.bytes[at + 8])) != 0) seed.fields.push_back({at, 8});
  }
  return seed;
}

}  // namespace

std::vector<Seed> Seeds() { return {Small(), WholeModel()}; }

}  // namespace refinery::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace refinery;
  auto file = checkpoint::GgufFile::Open(fuzz::InputFile(data, size, "input.gguf"));
  if (!file.ok()) return 0;
  ++fuzz::inputs_read;
  for (const auto& [name, tensor] : (*file)->tensors())
    if (tensor.rows() * tensor.row_size() <= fuzz::kMaxElements) (void)(*file)->Dequantize(name);
  (void)checkpoint::TokenizerFromGguf(**file);
  if (!checkpoint::DescribeGgufModel(**file).ok()) return 0;
  const std::filesystem::path folder = fuzz::InputFolder() / "model";
  std::filesystem::create_directories(folder);
  (void)checkpoint::WriteGgufModelFolder(**file, folder);
  return 0;
}
