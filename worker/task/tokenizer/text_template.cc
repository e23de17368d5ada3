#include "worker/task/tokenizer/text_template.h"

#include "worker/task/tokenizer/bridge_text.h"

namespace refinery::tokenizer {

struct TextTemplate::Impl {
  RbTemplate* compiled = nullptr;
  ~Impl() { RbTemplateFree(compiled); }
};

TextTemplate::TextTemplate(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
TextTemplate::~TextTemplate() = default;

StatusOr<std::shared_ptr<const TextTemplate>> TextTemplate::Compile(const std::string& source) {
  auto impl = std::make_unique<Impl>();
  OwnedString error;
  if (RbTemplateNewPlain(TextOf(source), &impl->compiled, &error) != 0) return InvalidArgument(error.Take());
  return std::shared_ptr<const TextTemplate>(new TextTemplate(std::move(impl)));
}

StatusOr<std::string> TextTemplate::Render(const nlohmann::json& variables) const {
  const std::string text = variables.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  OwnedString rendered, error;
  if (RbTemplateRender(impl_->compiled, TextOf(text), /*now_seconds=*/0, &rendered, &error) != 0) {
    return InvalidArgument(error.Take());
  }
  return rendered.Take();
}

}  // namespace refinery::tokenizer
