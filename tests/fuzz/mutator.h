// tests/fuzz/mutator.h
//
// Seeded damage to protobuf messages, beside that to bytes (tests/support/byte_mutator.h).
//
// Threads: one.

#pragma once

#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

#include "tests/support/byte_mutator.h"

namespace refinery::fuzz {

class Mutator : public testing::ByteMutator {
 public:
  using ByteMutator::ByteMutator;

  // One to three changes anywhere in the message: fields lost, set to odd values or to what stands elsewhere, elements doubled,
  // dropped and swapped. Fields named `spare` stay as they are.
  void Change(google::protobuf::Message* message, const std::string& spare = "") {
    for (size_t edits = 1 + Below(3); edits > 0; --edits) {
      std::vector<google::protobuf::Message*> all;
      texts_.clear();
      Collect(message, spare, &all);
      google::protobuf::Message* chosen = all[Below(all.size())];
      const auto* type = chosen->GetDescriptor();
      if (type->field_count() == 0) continue;
      const auto* field = type->field(static_cast<int>(Below(static_cast<size_t>(type->field_count()))));
      if (field->name() != spare) ChangeField(chosen, field);
    }
  }

 private:
  using Message = google::protobuf::Message;
  using Field = google::protobuf::FieldDescriptor;

  void Collect(Message* message, const std::string& spare, std::vector<Message*>* all) {
    all->push_back(message);
    const auto* reflection = message->GetReflection();
    std::vector<const Field*> set;
    reflection->ListFields(*message, &set);
    for (const Field* field : set) {
      if (field->name() == spare) continue;
      const int count = field->is_repeated() ? reflection->FieldSize(*message, field) : 1;
      for (int i = 0; i < count; ++i) {
        if (field->cpp_type() == Field::CPPTYPE_MESSAGE) {
          Collect(field->is_repeated() ? reflection->MutableRepeatedMessage(message, field, i) : reflection->MutableMessage(message, field),
                  spare, all);
        } else if (field->type() == Field::TYPE_STRING) {
          texts_.push_back(field->is_repeated() ? reflection->GetRepeatedString(*message, field, i) : reflection->GetString(*message, field));
        }
      }
    }
  }

  void ChangeField(Message* message, const Field* field) {
    const auto* reflection = message->GetReflection();
    if (!field->is_repeated()) {
      if (field->cpp_type() == Field::CPPTYPE_MESSAGE) {
        if (Below(2) == 0) return reflection->ClearField(message, field);
        reflection->MutableMessage(message, field);
        return;
      }
      return Below(4) == 0 ? reflection->ClearField(message, field) : SetOdd(message, field);
    }
    const int size = reflection->FieldSize(*message, field);
    const int some = static_cast<int>(Below(static_cast<size_t>(std::max(1, size))));
    switch (Below(4)) {
      case 0:
        if (size > 0) reflection->RemoveLast(message, field);
        return;
      case 1:
        if (size > 1) reflection->SwapElements(message, field, some, 0);
        return;
      case 2: return reflection->ClearField(message, field);
      default:
        if (field->cpp_type() == Field::CPPTYPE_MESSAGE && !field->is_map()) {
          Message* added = reflection->AddMessage(message, field);
          if (size > 0) added->CopyFrom(reflection->GetRepeatedMessage(*message, field, some));
        } else if (field->type() == Field::TYPE_STRING) {
          reflection->AddString(message, field, OddText());
        }
    }
  }

  std::string OddText() {
    if (!texts_.empty() && Below(4) != 0) return texts_[Below(texts_.size())];
    static const char* const kOdd[] = {"", "x", "../..", "a b\n", "sha256:", "tenants/a/jobs/b", "\xc3\xbc"};
    return kOdd[Below(std::size(kOdd))];
  }

  template <typename T>
  T OddNumber() {
    constexpr T kMax = std::numeric_limits<T>::max(), kMin = std::numeric_limits<T>::lowest();
    const T values[] = {T{0}, T{1}, T{2}, T{7}, static_cast<T>(T{0} - T{1}), kMax, kMin, static_cast<T>(kMax / 2 + 1), static_cast<T>(Below(100))};
    return values[Below(std::size(values))];
  }

  void SetOdd(Message* message, const Field* field) {
    const auto* r = message->GetReflection();
    switch (field->cpp_type()) {
      case Field::CPPTYPE_INT32: return r->SetInt32(message, field, OddNumber<int32_t>());
      case Field::CPPTYPE_INT64: return r->SetInt64(message, field, OddNumber<int64_t>());
      case Field::CPPTYPE_UINT32: return r->SetUInt32(message, field, OddNumber<uint32_t>());
      case Field::CPPTYPE_UINT64: return r->SetUInt64(message, field, OddNumber<uint64_t>());
      case Field::CPPTYPE_FLOAT: return r->SetFloat(message, field, OddNumber<float>());
      case Field::CPPTYPE_DOUBLE:
        return r->SetDouble(message, field, Below(4) == 0 ? std::numeric_limits<double>::quiet_NaN() : OddNumber<double>());
      case Field::CPPTYPE_BOOL: return r->SetBool(message, field, !r->GetBool(*message, field));
      case Field::CPPTYPE_ENUM: return r->SetEnumValue(message, field, static_cast<int>(Below(12)));
      case Field::CPPTYPE_STRING: return r->SetString(message, field, field->type() == Field::TYPE_STRING ? OddText() : Bytes("\x01\x02\x03"));
      case Field::CPPTYPE_MESSAGE: return;
    }
  }

  std::vector<std::string> texts_;   // of the message at hand
};

}  // namespace refinery::fuzz
