#include "common/yaml_message.h"

#include <google/protobuf/descriptor.h>
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <set>
#include <sstream>

namespace refinery {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;

int LineOfNode(const YAML::Node& node) { return node.Mark().line + 1; }

std::string Child(const std::string& path, const std::string& key) { return path.empty() ? key : Join(path, ".", key); }

std::vector<std::string> FieldNames(const Descriptor& type) {
  std::vector<std::string> names;
  for (int i = 0; i < type.field_count(); ++i) names.push_back(type.field(i)->name());
  return names;
}

std::string JoinNames(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

// "a whole number from 0", for messages.
std::string TypeInWords(const FieldDescriptor& field) {
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_UINT32:
    case FieldDescriptor::CPPTYPE_UINT64: return "a whole number from 0";
    case FieldDescriptor::CPPTYPE_INT32:
    case FieldDescriptor::CPPTYPE_INT64: return "a whole number";
    case FieldDescriptor::CPPTYPE_DOUBLE:
    case FieldDescriptor::CPPTYPE_FLOAT: return "a number";
    case FieldDescriptor::CPPTYPE_BOOL: return "true or false";
    case FieldDescriptor::CPPTYPE_STRING: return "a text";
    case FieldDescriptor::CPPTYPE_ENUM: return "a name";
    case FieldDescriptor::CPPTYPE_MESSAGE:
      return Join("a mapping with the keys ", JoinNames(FieldNames(*field.message_type())));
  }
  return "a value";
}

std::string NodeInWords(const YAML::Node& node) {
  if (node.IsMap()) return "a mapping";
  if (node.IsSequence()) return "a list";
  if (!node.IsScalar()) return "nothing";
  std::string text = node.Scalar().substr(0, 60);
  return Join("'", text, "'");
}

template <typename T>
bool ParseNumber(const std::string& text, T* value) {
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *value);
  return error == std::errc() && end == text.data() + text.size() && !text.empty();
}

// Whether plain (unquoted) text stands there; a quoted "3" is a text and no number.
bool IsPlain(const YAML::Node& node) { return node.Tag() != "!"; }

class Reader {
 public:
  Reader(std::string name, YamlPlaces* places) : name_(std::move(name)), places_(places) {}

  Status ReadMessage(const YAML::Node& node, const std::string& path, Message* message) {
    const Descriptor& type = *message->GetDescriptor();
    std::set<std::string> seen;
    for (const auto& entry : node) {
      if (!entry.first.IsScalar()) return Error(entry.first, "a key must be a name");
      const std::string key = entry.first.Scalar();
      const FieldDescriptor* field = type.FindFieldByName(key);
      if (field == nullptr) return UnknownKey(entry.first, path, type);
      const std::string child = Child(path, key);
      if (!seen.insert(key).second) return Error(entry.first, Join(child, " is given twice; remove one of the two"));
      places_->lines[child] = LineOfNode(entry.first);
      RF_RETURN_IF_ERROR(CheckOneof(entry.first, child, *field, *message));
      RF_RETURN_IF_ERROR(ReadField(entry.second, child, *field, message));
    }
    return absl::OkStatus();
  }

 private:
  Status Error(const YAML::Node& node, const std::string& what) const {
    return InvalidArgument(name_, ":", LineOfNode(node), ": ", what);
  }

  Status TypeError(const YAML::Node& node, const std::string& path, const FieldDescriptor& field) const {
    return Error(node, Join(path, " must be ", TypeInWords(field), ", is ", NodeInWords(node)));
  }

  Status UnknownKey(const YAML::Node& key, const std::string& path, const Descriptor& type) const {
    const std::vector<std::string> known = FieldNames(type);
    const std::string near = Nearest(key.Scalar(), known);
    const std::string hint = near.empty() ? Join("known keys: ", JoinNames(known)) : Join("did you mean '", near, "'?");
    return Error(key,
                 Join("unknown key '", key.Scalar().substr(0, 60), "'", path.empty() ? "" : " in ", path, "; ", hint));
  }

  Status CheckOneof(const YAML::Node& key, const std::string& path, const FieldDescriptor& field,
                    const Message& message) const {
    const auto* oneof = field.real_containing_oneof();
    if (oneof == nullptr || !message.GetReflection()->HasOneof(message, oneof)) return absl::OkStatus();
    const std::string other = message.GetReflection()->GetOneofFieldDescriptor(message, oneof)->name();
    return Error(key, Join(path, " cannot stand beside '", other, "'; keep one of the two"));
  }

  Status ReadField(const YAML::Node& node, const std::string& path, const FieldDescriptor& field, Message* message) {
    const Reflection& reflection = *message->GetReflection();
    if (field.is_map()) return ReadMap(node, path, field, message);
    if (field.is_repeated()) {
      if (node.IsNull()) return absl::OkStatus();
      if (!node.IsSequence()) return Error(node, Join(path, " must be a list, is ", NodeInWords(node)));
      int index = 0;
      for (const auto& item : node) {
        const std::string child = Join(path, "[", index++, "]");
        places_->lines[child] = LineOfNode(item);
        RF_RETURN_IF_ERROR(ReadValue(item, child, field, message));
      }
      return absl::OkStatus();
    }
    if (field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
      Message* child = reflection.MutableMessage(message, &field);
      if (node.IsNull()) return absl::OkStatus();  // "critique:" alone: all its defaults
      if (!node.IsMap()) return TypeError(node, path, field);
      return ReadMessage(node, path, child);
    }
    return ReadValue(node, path, field, message);
  }

  // A map field: its entries are messages with the fields 1 (key, a text) and 2 (value).
  Status ReadMap(const YAML::Node& node, const std::string& path, const FieldDescriptor& field, Message* message) {
    if (node.IsNull()) return absl::OkStatus();
    if (!node.IsMap()) return Error(node, Join(path, " must be a mapping, is ", NodeInWords(node)));
    std::set<std::string> seen;
    for (const auto& entry : node) {
      if (!entry.first.IsScalar()) return Error(entry.first, "a key must be a name");
      const std::string child = Child(path, entry.first.Scalar());
      if (!seen.insert(child).second) return Error(entry.first, Join(child, " is given twice; remove one of the two"));
      places_->lines[child] = LineOfNode(entry.first);
      Message* item = message->GetReflection()->AddMessage(message, &field);
      RF_RETURN_IF_ERROR(ReadValue(entry.first, child, *field.message_type()->map_key(), item));
      RF_RETURN_IF_ERROR(ReadField(entry.second, child, *field.message_type()->map_value(), item));
    }
    return absl::OkStatus();
  }

  // One value of the field's type: sets a singular field, appends to a repeated one.
  Status ReadValue(const YAML::Node& node, const std::string& path, const FieldDescriptor& field, Message* message) {
    const Reflection& reflection = *message->GetReflection();
    if (field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
      if (!node.IsMap()) return TypeError(node, path, field);
      return ReadMessage(node, path, reflection.AddMessage(message, &field));
    }
    if (!node.IsScalar()) return TypeError(node, path, field);
    bool zero = false;
    RF_RETURN_IF_ERROR(ReadScalar(node, path, field, message, &zero));
    if (zero && !field.is_repeated() && !field.has_presence()) places_->written_zeros.push_back(path);
    return absl::OkStatus();
  }

  template <typename T, typename Set>
  Status SetNumber(const YAML::Node& node, const std::string& path, const FieldDescriptor& field, bool* zero, Set set) {
    std::string text = node.Scalar();
    if (!text.empty() && text.front() == '+') text.erase(0, 1);
    T value{};
    if (!IsPlain(node) || !ParseNumber(text, &value)) return TypeError(node, path, field);
    if constexpr (std::is_floating_point_v<T>) {
      if (!std::isfinite(value)) return Error(node, Join(path, " must be a finite number, is ", NodeInWords(node)));
    }
    *zero = value == T{};
    set(value);
    return absl::OkStatus();
  }

  Status ReadScalar(const YAML::Node& node, const std::string& path, const FieldDescriptor& field, Message* message,
                    bool* zero) {
    const Reflection& r = *message->GetReflection();
    const bool add = field.is_repeated();
    switch (field.cpp_type()) {
#define RF_NUMBER(CASE, TYPE, SUFFIX)                                                      \
  case FieldDescriptor::CASE:                                                              \
    return SetNumber<TYPE>(node, path, field, zero, [&](TYPE value) {                      \
      add ? r.Add##SUFFIX(message, &field, value) : r.Set##SUFFIX(message, &field, value); \
    });
      RF_NUMBER(CPPTYPE_UINT32, uint32_t, UInt32)
      RF_NUMBER(CPPTYPE_UINT64, uint64_t, UInt64)
      RF_NUMBER(CPPTYPE_INT32, int32_t, Int32)
      RF_NUMBER(CPPTYPE_INT64, int64_t, Int64)
      RF_NUMBER(CPPTYPE_DOUBLE, double, Double)
      RF_NUMBER(CPPTYPE_FLOAT, float, Float)
#undef RF_NUMBER
      case FieldDescriptor::CPPTYPE_BOOL: {
        const std::string& text = node.Scalar();
        if (!IsPlain(node) || (text != "true" && text != "false")) return TypeError(node, path, field);
        *zero = text == "false";
        add ? r.AddBool(message, &field, text == "true") : r.SetBool(message, &field, text == "true");
        return absl::OkStatus();
      }
      case FieldDescriptor::CPPTYPE_ENUM: {
        const auto* value = field.enum_type()->FindValueByName(node.Scalar());
        if (value == nullptr)
          return Error(
              node, Join(path, " must be one of the names of ", field.enum_type()->name(), ", is ", NodeInWords(node)));
        add ? r.AddEnum(message, &field, value) : r.SetEnum(message, &field, value);
        return absl::OkStatus();
      }
      case FieldDescriptor::CPPTYPE_STRING:
        *zero = node.Scalar().empty();
        add ? r.AddString(message, &field, node.Scalar()) : r.SetString(message, &field, node.Scalar());
        return absl::OkStatus();
      case FieldDescriptor::CPPTYPE_MESSAGE: break;
    }
    return TypeError(node, path, field);
  }

  std::string name_;
  YamlPlaces* places_;
};

// Protobuf texts must be UTF-8. Overlong forms and surrogates are refused.
bool IsUtf8(const std::string& text) {
  for (size_t i = 0; i < text.size();) {
    const auto lead = static_cast<unsigned char>(text[i]);
    const int extra = lead < 0x80 ? 0 : lead >> 5 == 6 ? 1 : lead >> 4 == 14 ? 2 : lead >> 3 == 30 ? 3 : -1;
    if (extra < 0 || i + extra >= text.size()) return false;
    uint32_t code = extra == 0 ? lead : lead & (0x3f >> extra);
    for (int k = 1; k <= extra; ++k) {
      const auto next = static_cast<unsigned char>(text[i + k]);
      if (next >> 6 != 2) return false;
      code = code << 6 | (next & 0x3f);
    }
    static constexpr uint32_t kSmallest[] = {0, 0x80, 0x800, 0x10000};
    if (code < kSmallest[extra] || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) return false;
    i += extra + 1;
  }
  return true;
}

void Emit(const Message& message, YAML::Emitter* out);

void EmitValue(const Message& message, const FieldDescriptor& field, int index, YAML::Emitter* out) {
  const Reflection& r = *message.GetReflection();
  const bool many = field.is_repeated();
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_UINT32:
      *out << (many ? r.GetRepeatedUInt32(message, &field, index) : r.GetUInt32(message, &field));
      break;
    case FieldDescriptor::CPPTYPE_UINT64:
      *out << (many ? r.GetRepeatedUInt64(message, &field, index) : r.GetUInt64(message, &field));
      break;
    case FieldDescriptor::CPPTYPE_INT32:
      *out << (many ? r.GetRepeatedInt32(message, &field, index) : r.GetInt32(message, &field));
      break;
    case FieldDescriptor::CPPTYPE_INT64:
      *out << (many ? r.GetRepeatedInt64(message, &field, index) : r.GetInt64(message, &field));
      break;
    case FieldDescriptor::CPPTYPE_DOUBLE: {
      // The shortest text that reads back as the same number.
      char buffer[32];
      const double value = many ? r.GetRepeatedDouble(message, &field, index) : r.GetDouble(message, &field);
      *out << std::string(buffer, std::to_chars(buffer, buffer + sizeof buffer, value).ptr);
      break;
    }
    case FieldDescriptor::CPPTYPE_FLOAT: {
      char buffer[32];
      const float value = many ? r.GetRepeatedFloat(message, &field, index) : r.GetFloat(message, &field);
      *out << std::string(buffer, std::to_chars(buffer, buffer + sizeof buffer, value).ptr);
      break;
    }
    case FieldDescriptor::CPPTYPE_BOOL:
      *out << (many ? r.GetRepeatedBool(message, &field, index) : r.GetBool(message, &field));
      break;
    case FieldDescriptor::CPPTYPE_ENUM:
      *out << (many ? r.GetRepeatedEnum(message, &field, index) : r.GetEnum(message, &field))->name();
      break;
    case FieldDescriptor::CPPTYPE_STRING:
      *out << (many ? r.GetRepeatedString(message, &field, index) : r.GetString(message, &field));
      break;
    case FieldDescriptor::CPPTYPE_MESSAGE:
      Emit(many ? r.GetRepeatedMessage(message, &field, index) : r.GetMessage(message, &field), out);
      break;
  }
}

void EmitMap(const Message& message, const FieldDescriptor& field, YAML::Emitter* out) {
  const Reflection& r = *message.GetReflection();
  *out << YAML::BeginMap;
  for (int i = 0; i < r.FieldSize(message, &field); ++i) {
    const Message& entry = r.GetRepeatedMessage(message, &field, i);
    *out << YAML::Key;
    EmitValue(entry, *field.message_type()->map_key(), 0, out);
    *out << YAML::Value;
    EmitValue(entry, *field.message_type()->map_value(), 0, out);
  }
  *out << YAML::EndMap;
}

void Emit(const Message& message, YAML::Emitter* out) {
  const Reflection& r = *message.GetReflection();
  const Descriptor& type = *message.GetDescriptor();
  *out << YAML::BeginMap;
  for (int i = 0; i < type.field_count(); ++i) {
    const FieldDescriptor& field = *type.field(i);
    if (field.is_repeated() ? r.FieldSize(message, &field) == 0 : !r.HasField(message, &field)) continue;
    *out << YAML::Key << field.name() << YAML::Value;
    if (field.is_map()) {
      EmitMap(message, field, out);
    } else if (field.is_repeated()) {
      if (field.cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE) *out << YAML::Flow;
      *out << YAML::BeginSeq;
      for (int k = 0; k < r.FieldSize(message, &field); ++k) EmitValue(message, field, k, out);
      *out << YAML::EndSeq;
    } else {
      EmitValue(message, field, 0, out);
    }
  }
  *out << YAML::EndMap;
}

// Optimal string alignment distance: one insertion, deletion, substitution or swap of neighbours costs 1.
size_t EditDistance(const std::string& a, const std::string& b) {
  std::vector<std::vector<size_t>> d(a.size() + 1, std::vector<size_t>(b.size() + 1));
  for (size_t i = 0; i <= a.size(); ++i) d[i][0] = i;
  for (size_t j = 0; j <= b.size(); ++j) d[0][j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    for (size_t j = 1; j <= b.size(); ++j) {
      d[i][j] = std::min({d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (a[i - 1] != b[j - 1])});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1])
        d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
    }
  }
  return d[a.size()][b.size()];
}

// Counts documents and sees where each begins.
class DocumentMarks final : public YAML::EventHandler {
 public:
  using Mark = YAML::Mark;
  using Anchor = YAML::anchor_t;
  using Style = YAML::EmitterStyle::value;
  void OnDocumentStart(const Mark& mark) override { marks.push_back(mark); }
  void OnDocumentEnd() override {}
  void OnNull(const Mark&, Anchor) override {}
  void OnAlias(const Mark&, Anchor) override {}
  void OnScalar(const Mark&, const std::string&, Anchor, const std::string&) override {}
  void OnSequenceStart(const Mark&, const std::string&, Anchor, Style) override {}
  void OnSequenceEnd() override {}
  void OnMapStart(const Mark&, const std::string&, Anchor, Style) override {}
  void OnMapEnd() override {}
  std::vector<Mark> marks;
};

// The only document of the text. YAML::LoadAll, and the parser beneath it, find documents without end where one begins with ','.
StatusOr<YAML::Node> LoadOne(const std::string& text, const std::string& name) {
  std::istringstream stream(text);
  YAML::Parser parser(stream);
  DocumentMarks found;
  if (parser.HandleNextDocument(found)) parser.HandleNextDocument(found);
  if (found.marks.size() > 1) {
    const bool is_stuck = found.marks[0].pos == found.marks[1].pos;
    return InvalidArgument(name, ":", found.marks[1].line + 1, is_stuck ? ": not valid YAML" : ": more than one YAML document");
  }
  YAML::Node node;
  if (!found.marks.empty()) node = YAML::Load(text);
  if (node.IsNull()) return InvalidArgument(name, ":1: the file is empty");
  return node;
}

}  // namespace

int YamlPlaces::LineOf(const std::string& path) const {
  for (std::string rest = path; !rest.empty();) {
    auto it = lines.find(rest);
    if (it != lines.end()) return it->second;
    const size_t cut = rest.find_last_of(".[");
    if (cut == std::string::npos) break;
    rest.resize(cut);
  }
  return 0;
}

Status YamlToMessage(const std::string& text, const std::string& name, google::protobuf::Message* message,
                     YamlPlaces* places) {
  if (!IsUtf8(text)) return InvalidArgument(name, ":1: not UTF-8 text");
  // yaml-cpp reports by exception; this is the only place that calls its parser.
  try {
    RF_ASSIGN_OR_RETURN(const YAML::Node root, LoadOne(text, name));
    if (!root.IsMap()) return InvalidArgument(name, ":1: must be a mapping, is ", NodeInWords(root));
    return Reader(name, places).ReadMessage(root, "", message);
  } catch (const YAML::Exception& e) {
    return InvalidArgument(name, ":", std::max(e.mark.line + 1, 1), ": not valid YAML: ", e.msg);
  }
}

std::string MessageToYaml(const google::protobuf::Message& message) {
  YAML::Emitter out;
  Emit(message, &out);
  return std::string(out.c_str()) + "\n";
}

std::string Nearest(const std::string& word, const std::vector<std::string>& candidates) {
  std::string best;
  size_t best_distance = 0;
  const std::string start = word.substr(0, 64);  // bounds the work on hostile input
  for (const std::string& candidate : candidates) {
    const size_t distance = EditDistance(start, candidate);
    if (3 * distance > std::max(start.size(), candidate.size())) continue;
    if (best.empty() || distance < best_distance) {
      best = candidate;
      best_distance = distance;
    }
  }
  return best;
}

}  // namespace refinery
