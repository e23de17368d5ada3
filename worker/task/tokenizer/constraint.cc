#include "worker/task/tokenizer/constraint.h"

#include <algorithm>
#include <utility>

#include "worker/task/tokenizer/bridge_text.h"

namespace refinery::tokenizer {

TokenConstraint::~TokenConstraint() { RbConstraintFree(constraint_); }

Status TokenConstraint::Mask(std::vector<uint32_t>& bits) {
  bits.assign(static_cast<size_t>((vocab_size_ + 31) / 32), 0);
  OwnedString error;
  if (RbConstraintMask(constraint_, bits.data(), bits.size(), &error) != 0)
    return ResourceExhausted("the constraint cannot say which tokens may follow: ", error.Take());
  return absl::OkStatus();
}

Status TokenConstraint::Accept(int32_t token) {
  if (token < 0) return InvalidArgument("the token id ", token, " is negative");
  OwnedString error;
  if (RbConstraintAccept(constraint_, static_cast<uint32_t>(token), &error) != 0)
    return InvalidArgument("the constraint refuses token ", token, ": ", error.Take());
  return absl::OkStatus();
}

bool TokenConstraint::finished() const { return RbConstraintFinished(constraint_); }
bool TokenConstraint::can_stop() const { return RbConstraintCanStop(constraint_); }

StatusOr<std::shared_ptr<const ConstraintFactory>> ConstraintFactory::Make(const Tokenizer& tokenizer,
                                                                           int64_t vocab_size,
                                                                           std::vector<int32_t> end_ids) {
  if (end_ids.empty()) end_ids = tokenizer.end_ids();
  std::vector<uint32_t> ends;
  for (int32_t id : end_ids) {
    if (id < 0) return InvalidArgument("the end token id ", id, " is negative");
    ends.push_back(static_cast<uint32_t>(id));
  }
  RbConstraintFactory* factory = nullptr;
  OwnedString error;
  if (RbConstraintFactoryNew(tokenizer.bridge(), ends.data(), ends.size(),
                             static_cast<size_t>(std::max<int64_t>(vocab_size, 0)), &factory, &error) != 0)
    return FailedPrecondition("constrained decoding cannot use the tokenizer of ", tokenizer.folder(), ": ",
                              error.Take());
  int64_t covered = static_cast<int64_t>(RbConstraintFactoryVocabSize(factory));
  return std::shared_ptr<const ConstraintFactory>(new ConstraintFactory(factory, covered));
}

ConstraintFactory::~ConstraintFactory() { RbConstraintFactoryFree(factory_); }

StatusOr<std::unique_ptr<TokenConstraint>> ConstraintFactory::New(int kind, std::string_view what,
                                                                  std::string_view source) const {
  RbConstraint* constraint = nullptr;
  OwnedString error;
  if (RbConstraintNew(factory_, kind, TextOf(source), &constraint, &error) != 0)
    return InvalidArgument("the ", what, " cannot constrain a text: ", error.Take());
  return std::unique_ptr<TokenConstraint>(new TokenConstraint(constraint, vocab_size_));
}

StatusOr<std::unique_ptr<TokenConstraint>> ConstraintFactory::FromJsonSchema(std::string_view schema) const {
  return New(kRbJsonSchema, "JSON schema", schema);
}

StatusOr<std::unique_ptr<TokenConstraint>> ConstraintFactory::FromRegex(std::string_view regex) const {
  return New(kRbRegex, "regular expression", regex);
}

StatusOr<std::unique_ptr<TokenConstraint>> ConstraintFactory::FromLark(std::string_view grammar) const {
  return New(kRbLark, "Lark grammar", grammar);
}

}  // namespace refinery::tokenizer
