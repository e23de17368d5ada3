// safetensors: opens the file and touches every byte of every tensor.
#include "worker/task/runtime/torch.h"
//
#include <cstring>

#include "tests/fuzz/fuzz_target.h"
#include "worker/task/checkpoint/safetensors.h"

namespace refinery::fuzz {

const char kFormat[] = "safetensors";
const TextKind kTextKind = TextKind::kJson;

namespace {

std::string File(std::string_view header, size_t data_bytes) {
  const uint64_t size = header.size();
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &size, sizeof(size));
  return bytes + std::string(header) + std::string(data_bytes, '\x01');
}

Seed Make(const std::string& name, const std::string& header, size_t data_bytes) {
  return {.name = name, .bytes = File(header, data_bytes), .fields = {{0, 8}}, .text = header,
          .rebuild = [data_bytes](std::string_view text) { return File(text, data_bytes); }};
}

}  // namespace

std::vector<Seed> Seeds() {
  return {Make("two tensors",
               R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
               R"("b":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]}})", 32),
          Make("no tensors", R"({"__metadata__":{}})", 0),
          Make("unaligned and empty",
               R"({"x":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"y":{"dtype":"I64","shape":[1],"data_offsets":[3,11]},)"
               R"("z":{"dtype":"F16","shape":[0,7],"data_offsets":[11,11]},"s":{"dtype":"BOOL","shape":[],"data_offsets":[11,12]}})", 12)};
}

}  // namespace refinery::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace refinery;
  auto file = checkpoint::SafetensorsFile::Open(fuzz::InputFile(data, size, "input.safetensors"));
  if (!file.ok()) return 0;
  ++fuzz::inputs_read;
  for (const auto& [name, info] : (*file)->tensors()) {
    auto tensor = (*file)->Get(name);
    if (tensor.ok()) (void)tensor->contiguous().view({-1}).to(at::kDouble).sum().item<double>();
  }
  return 0;
}
