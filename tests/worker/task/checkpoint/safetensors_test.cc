// safetensors: round trips, the format's rules, and that damaged files give a sentence instead of a crash.
#include "worker/task/runtime/torch.h"
//
#include "worker/task/checkpoint/safetensors.h"

#include <fstream>

#include "tests/support/status_matchers.h"
#include "tests/worker/task/checkpoint/folder_fixture.h"

namespace refinery::checkpoint {
namespace {

using ::refinery::testing::IsOk;
using ::refinery::testing::StatusIs;
using ::testing::AllOf;
using ::testing::HasSubstr;

class SafetensorsTest : public FolderTest {
 protected:
  // A file with this header text, a matching length prefix and so many bytes of data.
  StatusOr<std::shared_ptr<SafetensorsFile>> OpenWith(const std::string& header, size_t data_bytes) {
    std::string bytes(8, '\0');
    for (size_t i = 0; i < 8; ++i) bytes[i] = static_cast<char>(header.size() >> (8 * i));
    return SafetensorsFile::Open(Write("model.safetensors", bytes + header + std::string(data_bytes, 'x')));
  }
};

// The bytes of safetensors.torch 0.8 for {"a": float32 [[1, 2], [3, 4]], "b": int64 [5]}, but for the order in the
// header.
TEST_F(SafetensorsTest, ReadsAFileOfTheReference) {
  std::string header = R"({"b":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},)"
                       R"("a":{"dtype":"F32","shape":[2,2],"data_offsets":[8,24]}})";
  std::string bytes(8, '\0');
  bytes[0] = static_cast<char>(header.size());
  bytes += header + std::string("\x05\0\0\0\0\0\0\0", 8) +
           std::string("\0\0\x80\x3f\0\0\0\x40\0\0\x40\x40\0\0\x80\x40", 16);
  auto file = SafetensorsFile::Open(Write("reference.safetensors", bytes));
  ASSERT_THAT(file, IsOk());
  EXPECT_TRUE(at::equal(*(*file)->Get("a"), at::arange(1, 5, at::kFloat).view({2, 2})));
  EXPECT_EQ((*file)->Get("b")->item<int64_t>(), 5);
  EXPECT_THAT((*file)->Get("c"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("no tensor c")));
}

TEST_F(SafetensorsTest, EveryDtypeSurvivesARoundTrip) {
  at::manual_seed(1);
  std::map<std::string, at::Tensor> tensors;
  for (at::ScalarType dtype : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16, at::kLong, at::kInt, at::kShort,
                               at::kChar, at::kByte, at::kBool})
    tensors[c10::toString(dtype)] = (at::rand({3, 5}) * 100).to(dtype);
  tensors["empty"] = at::empty({0, 4});
  tensors["scalar"] = at::tensor(2.5);
  tensors["strided"] = at::rand({4, 6}).t();
  std::filesystem::path path = folder_ / "m.safetensors";
  ASSERT_THAT(WriteSafetensors(path, tensors, {{"format", "pt"}, {"note", "a \"quote\""}}), IsOk());
  std::shared_ptr<SafetensorsFile> file = *SafetensorsFile::Open(path);
  EXPECT_EQ(file->metadata().at("note"), "a \"quote\"");
  ASSERT_EQ(file->tensors().size(), tensors.size());
  for (const auto& [name, tensor] : tensors) {
    at::Tensor read = *file->Get(name);
    EXPECT_EQ(read.scalar_type(), tensor.scalar_type()) << name;
    EXPECT_TRUE(at::equal(read, tensor)) << name;
  }
  std::string first = *ReadFile(path);
  ASSERT_THAT(WriteSafetensors(path, tensors, {{"format", "pt"}, {"note", "a \"quote\""}}), IsOk());
  EXPECT_EQ(first, *ReadFile(path)) << "the same tensors must give the same bytes";
}

TEST_F(SafetensorsTest, TensorsOutliveTheFileObject) {
  std::filesystem::path path = folder_ / "m.safetensors";
  ASSERT_THAT(WriteSafetensors(path, {{"w", at::full({1000}, 3.0)}}), IsOk());
  at::Tensor kept;
  {
    kept = *(*SafetensorsFile::Open(path))->Get("w");
  }
  std::filesystem::remove(path);
  EXPECT_EQ(kept.sum().item<double>(), 3000.0);
}

// Resident memory of this process that maps files, in KiB.
int64_t MappedKib() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.starts_with("RssFile:")) return std::stoll(line.substr(8));
  return -1;
}

// Goal: who reads a file tensor by tensor never holds it whole.  Oracle: the kernel's own count of mapped pages.
TEST_F(SafetensorsTest, PagesGoWithTheLastTensorOverThem) {
  constexpr int64_t kMib = 1 << 20;
  std::filesystem::path path = folder_ / "m.safetensors";
  ASSERT_THAT(WriteSafetensors(path, {{"a", at::ones({16 * kMib}, at::kByte)}, {"b", at::ones({16 * kMib}, at::kByte)}}), IsOk());
  auto file = SafetensorsFile::Open(path);
  ASSERT_THAT(file, IsOk());
  const int64_t before = MappedKib();
  ASSERT_GE(before, 0);
  at::Tensor kept = *(*file)->Get("a");
  EXPECT_EQ(kept.sum().item<int64_t>(), 16 * kMib);
  EXPECT_GT(MappedKib() - before, 15 * 1024);
  EXPECT_EQ((*file)->Get("b")->sum().item<int64_t>(), 16 * kMib);
  EXPECT_LT(MappedKib() - before, 18 * 1024) << "b's pages stayed";
  at::Tensor alias = kept.slice(0, 5);
  kept = at::Tensor();
  EXPECT_GT(MappedKib() - before, 15 * 1024) << "a's pages went while a tensor over them was alive";
  alias = at::Tensor();
  EXPECT_LT(MappedKib() - before, 3 * 1024);
  EXPECT_EQ((*file)->Get("a")->sum().item<int64_t>(), 16 * kMib) << "pages come back";
}

TEST_F(SafetensorsTest, RefusesWhatTheFormatForbids) {
  auto refuses = [&](const std::string& header, size_t bytes, const std::string& reason) {
    EXPECT_THAT(OpenWith(header, bytes),
                StatusIs(absl::StatusCode::kDataLoss, AllOf(HasSubstr("model.safetensors"), HasSubstr(reason))))
        << header;
  };
  refuses("[]", 0, "not a JSON object");
  refuses("{\"a\":", 0, "not a JSON object");
  refuses(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 4, "outside");
  refuses(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})", 8, "outside");
  refuses(R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", 8, "need 12");
  refuses(R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,8]}})", 8, "whole number");
  refuses(R"({"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}})", 0, "overflows");
  refuses(R"({"a":{"dtype":"I8","shape":[0,4611686018427387904,4],"data_offsets":[0,0]}})", 0, "overflows");
  refuses(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
          R"("b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}})",
          6, "overlaps");
  refuses(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", 8, "gap");
  refuses(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 9, "belong to no tensor");
  refuses(R"({"a":{"dtype":"F32","shape":[1]}})", 4, "malformed");
  EXPECT_THAT(OpenWith(R"({"a":{"dtype":"F4","shape":[1],"data_offsets":[0,1]}})", 1),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("dtype F4")));
  EXPECT_THAT(SafetensorsFile::Open(Write("huge.safetensors", std::string(8, '\xff'))),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("header length")));
  EXPECT_THAT(SafetensorsFile::Open(folder_ / "none"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("none")));
}

TEST_F(SafetensorsTest, DamagedFilesNeverCrash) {
  std::filesystem::path path = folder_ / "m.safetensors";
  ASSERT_THAT(WriteSafetensors(path, {{"first", at::rand({4, 3})}, {"second", at::ones({5}, at::kHalf)}}), IsOk());
  std::string original = *ReadFile(path);
  int refused = 0;
  for (int round = 0; round < 1500; ++round) {
    auto file = SafetensorsFile::Open(Write("damaged.safetensors", Damage(original, round, 200)));
    if (!file.ok()) {
      ++refused;
      EXPECT_THAT(Message(file.status()), HasSubstr("damaged.safetensors"));
      continue;
    }
    for (const auto& [name, info] : (*file)->tensors()) {
      at::Tensor tensor = *(*file)->Get(name);
      if (tensor.numel() == 0) continue;
      EXPECT_GE(tensor.to(at::kDouble).nan_to_num().abs().max().item<double>(), 0);  // reads every byte
    }
  }
  EXPECT_GT(refused, 400);
}

}  // namespace
}  // namespace refinery::checkpoint
