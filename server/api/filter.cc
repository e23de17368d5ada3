#include "server/api/filter.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <memory>
#include <string_view>

#include "common/yaml_message.h"
#include "server/api/visible.h"

namespace refinery::api {
namespace {

constexpr size_t kMaxText = 2000;
constexpr int kMaxDepth = 32;
constexpr int kMaxTerms = 100;
constexpr size_t kMaxSortKeys = 4;

// A field is a number or a text.
struct Field {
  const char* name;
  double (*number)(const jobs::JobState&);
  std::string (*text)(const jobs::JobState&);
};

double TasksDone(const jobs::JobState& job) {
  return static_cast<double>(std::ranges::count_if(job.tasks, [](const jobs::TaskState& task) {
    return task.state == v1::Task::DONE || task.state == v1::Task::CACHED;
  }));
}

const std::vector<Field>& Fields() {
  using Job = const jobs::JobState&;
  static const std::vector<Field> fields = {
      {"id", nullptr, [](Job job) { return job.id; }},
      {"name", nullptr, [](Job job) { return NameOf(job); }},
      {"state", nullptr, [](Job job) { return v1::Job::State_Name(job.state); }},
      {"tenant", nullptr, [](Job job) { return TenantOf(job); }},
      {"owner", nullptr, [](Job job) { return job.created.owner(); }},
      {"reason", nullptr, [](Job job) { return job.reason; }},
      {"priority", [](Job job) { return static_cast<double>(job.created.policy().priority()); }, nullptr},
      {"create_time_ms", [](Job job) { return static_cast<double>(job.create_time_ms); }, nullptr},
      {"end_time_ms", [](Job job) { return static_cast<double>(job.end_time_ms); }, nullptr},
      {"tasks_done", TasksDone, nullptr},
      {"tasks_total", [](Job job) { return static_cast<double>(job.tasks.size()); }, nullptr},
  };
  return fields;
}

StatusOr<const Field*> FindField(const std::string& name, std::string_view where) {
  std::vector<std::string> known;
  for (const Field& field : Fields()) {
    if (name == field.name) return &field;
    known.push_back(field.name);
  }
  const std::string nearest = Nearest(name, known);
  std::string names;
  for (const std::string& one : known) names += Join(names.empty() ? "" : ", ", one);
  return InvalidArgument(where, " knows no field '", name.substr(0, 80), "'; ",
                         nearest.empty() ? Join("known: ", names) : Join("did you mean '", nearest, "'?"));
}

bool IsWordChar(char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0 || std::string_view("_-./").find(c) != std::string_view::npos; }

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  StatusOr<JobPredicate> Parse() {
    RF_RETURN_IF_ERROR(Advance());
    RF_ASSIGN_OR_RETURN(JobPredicate all, Expression(0));
    if (!token_.empty()) return Unexpected("AND, OR or the end");
    return all;
  }

 private:
  Status Unexpected(std::string_view wanted) const {
    return InvalidArgument("filter, character ", start_ + 1, ": ", wanted, " is expected, not ",
                           token_.empty() ? "the end" : Join("'", token_.substr(0, 40), "'"));
  }

  // The next token; "" at the end.
  Status Advance() {
    quoted_ = false;
    token_.clear();
    while (next_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[next_])) != 0) ++next_;
    start_ = next_;
    if (next_ == text_.size()) return absl::OkStatus();
    const char c = text_[next_];
    if (c == '"' || c == '\'') return Quoted(c);
    if (IsWordChar(c)) {
      while (next_ < text_.size() && IsWordChar(text_[next_])) token_ += text_[next_++];
      return absl::OkStatus();
    }
    token_ = text_[next_++];
    if (std::string_view("!<>").find(c) != std::string_view::npos && next_ < text_.size() && text_[next_] == '=') {
      token_ += text_[next_++];
    }
    return absl::OkStatus();
  }

  Status Quoted(char quote) {
    quoted_ = true;
    for (++next_; next_ < text_.size() && text_[next_] != quote; ++next_) {
      if (text_[next_] == '\\' && next_ + 1 < text_.size()) ++next_;
      token_ += text_[next_];
    }
    if (next_ == text_.size()) return InvalidArgument("filter, character ", start_ + 1, ": the quote is not closed");
    ++next_;
    return absl::OkStatus();
  }

  bool IsKeyword(std::string_view word) const { return !quoted_ && token_ == word; }

  StatusOr<JobPredicate> Expression(int depth) {
    RF_ASSIGN_OR_RETURN(JobPredicate left, Alternatives(depth));
    while (IsKeyword("AND")) {
      RF_RETURN_IF_ERROR(Advance());
      RF_ASSIGN_OR_RETURN(JobPredicate right, Alternatives(depth));
      left = [left = std::move(left), right = std::move(right)](const jobs::JobState& job) { return left(job) && right(job); };
    }
    return left;
  }

  StatusOr<JobPredicate> Alternatives(int depth) {
    RF_ASSIGN_OR_RETURN(JobPredicate left, Term(depth));
    while (IsKeyword("OR")) {
      RF_RETURN_IF_ERROR(Advance());
      RF_ASSIGN_OR_RETURN(JobPredicate right, Term(depth));
      left = [left = std::move(left), right = std::move(right)](const jobs::JobState& job) { return left(job) || right(job); };
    }
    return left;
  }

  StatusOr<JobPredicate> Term(int depth) {
    if (depth > kMaxDepth || ++terms_ > kMaxTerms) {
      return InvalidArgument("filter has more than ", kMaxTerms, " terms or is nested deeper than ", kMaxDepth);
    }
    if (IsKeyword("NOT")) {
      RF_RETURN_IF_ERROR(Advance());
      RF_ASSIGN_OR_RETURN(JobPredicate inner, Term(depth + 1));
      return JobPredicate([inner = std::move(inner)](const jobs::JobState& job) { return !inner(job); });
    }
    if (IsKeyword("(")) {
      RF_RETURN_IF_ERROR(Advance());
      RF_ASSIGN_OR_RETURN(JobPredicate inner, Expression(depth + 1));
      if (!IsKeyword(")")) return Unexpected("')'");
      RF_RETURN_IF_ERROR(Advance());
      return inner;
    }
    return Comparison();
  }

  StatusOr<JobPredicate> Comparison() {
    if (quoted_ || token_.empty() || !IsWordChar(token_.front())) return Unexpected("a field");
    RF_ASSIGN_OR_RETURN(const Field* field, FindField(token_, "filter"));
    RF_RETURN_IF_ERROR(Advance());
    const std::string op = token_;
    static const std::vector<std::string> kOperators = {"=", "!=", "<", "<=", ">", ">=", ":"};
    if (quoted_ || std::ranges::find(kOperators, op) == kOperators.end()) return Unexpected("one of = != < <= > >= :");
    RF_RETURN_IF_ERROR(Advance());
    if (token_.empty() && !quoted_) return Unexpected("a value");
    if (!quoted_ && !IsWordChar(token_.front())) return Unexpected("a value");
    const std::string value = token_;
    RF_ASSIGN_OR_RETURN(JobPredicate test, field->number != nullptr ? Number(*field, op, value) : Text(*field, op, value));
    RF_RETURN_IF_ERROR(Advance());
    return test;
  }

  StatusOr<JobPredicate> Number(const Field& field, const std::string& op, const std::string& value) const {
    double wanted = 0;
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), wanted);
    if (error != std::errc() || end != value.data() + value.size()) return Unexpected(Join("a number for ", field.name));
    if (op == ":") return Unexpected(Join("a comparison: ", field.name, " is a number"));
    return JobPredicate([get = field.number, op, wanted](const jobs::JobState& job) {
      const double have = get(job);
      if (op == "=") return have == wanted;
      if (op == "!=") return have != wanted;
      if (op == "<") return have < wanted;
      if (op == "<=") return have <= wanted;
      if (op == ">") return have > wanted;
      return have >= wanted;
    });
  }

  StatusOr<JobPredicate> Text(const Field& field, const std::string& op, const std::string& value) const {
    v1::Job::State state;
    if (std::string_view(field.name) == "state" && (!v1::Job::State_Parse(value, &state) || (op != "=" && op != "!="))) {
      return Unexpected("= or != and a state such as RUNNING");
    }
    return JobPredicate([get = field.text, op, value](const jobs::JobState& job) {
      const std::string have = get(job);
      if (op == "=") return have == value;
      if (op == "!=") return have != value;
      if (op == ":") return have.find(value) != std::string::npos;
      if (op == "<") return have < value;
      if (op == "<=") return have <= value;
      if (op == ">") return have > value;
      return have >= value;
    });
  }

  const std::string_view text_;
  size_t next_ = 0;
  size_t start_ = 0;
  std::string token_;
  bool quoted_ = false;
  int terms_ = 0;
};

std::string_view Trim(std::string_view text) {
  while (!text.empty() && text.front() == ' ') text.remove_prefix(1);
  while (!text.empty() && text.back() == ' ') text.remove_suffix(1);
  return text;
}

}  // namespace

StatusOr<JobPredicate> ParseFilter(const std::string& text) {
  if (text.size() > kMaxText) return InvalidArgument("filter has ", text.size(), " characters; at most ", kMaxText);
  if (Trim(text).empty()) return JobPredicate([](const jobs::JobState&) { return true; });
  return Parser(text).Parse();
}

StatusOr<std::vector<SortKey>> ParseOrder(const std::string& text) {
  std::vector<SortKey> order;
  if (text.size() > kMaxText) return InvalidArgument("order_by has ", text.size(), " characters; at most ", kMaxText);
  if (Trim(text).empty()) return order;
  for (std::string_view rest = text; ;) {
    const size_t comma = rest.find(',');
    std::string_view one = Trim(rest.substr(0, comma));
    SortKey key;
    if (const size_t space = one.find(' '); space != std::string_view::npos) {
      const std::string_view direction = Trim(one.substr(space));
      if (direction != "desc" && direction != "asc") {
        return InvalidArgument("order_by: 'asc' or 'desc' is expected after ", one.substr(0, space), ", not '",
                               direction.substr(0, 40), "'");
      }
      key.descending = direction == "desc";
      one = one.substr(0, space);
    }
    key.field = std::string(one);
    RF_ASSIGN_OR_RETURN(const Field* field, FindField(key.field, "order_by"));
    key.is_number = field->number != nullptr;
    order.push_back(std::move(key));
    if (order.size() > kMaxSortKeys) return InvalidArgument("order_by names more than ", kMaxSortKeys, " fields");
    if (comma == std::string_view::npos) return order;
    rest.remove_prefix(comma + 1);
  }
}

std::vector<SortValue> SortValues(const jobs::JobState& job, const std::vector<SortKey>& order) {
  std::vector<SortValue> values;
  for (const SortKey& key : order) {
    const Field& field = *std::ranges::find_if(Fields(), [&](const Field& one) { return key.field == one.name; });
    values.push_back(key.is_number ? SortValue{.number = field.number(job)} : SortValue{.text = field.text(job)});
  }
  return values;
}

int Compare(const std::vector<SortValue>& a, const std::vector<SortValue>& b, const std::vector<SortKey>& order) {
  for (size_t i = 0; i < order.size(); ++i) {
    int sign = 0;
    if (order[i].is_number) {
      sign = a[i].number < b[i].number ? -1 : a[i].number > b[i].number ? 1 : 0;
    } else {
      sign = a[i].text.compare(b[i].text);
    }
    if (sign != 0) return order[i].descending ? -sign : sign;
  }
  return 0;
}

}  // namespace refinery::api
