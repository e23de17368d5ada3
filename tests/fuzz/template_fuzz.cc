// Chat templates: compiles the text, renders a conversation with a tool and odd messages.
#include "tests/fuzz/fuzz_target.h"
#include "worker/task/rust/bridge.h"

namespace refinery::fuzz {

const char kFormat[] = "template";
const TextKind kTextKind = TextKind::kTemplate;

std::vector<Seed> Seeds() {
  return {
      {.name = "chatml", .bytes = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
       "You help.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
       "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"},
      {.name = "tools", .bytes = "{{- bos_token }}{%- set ns = namespace(found=false, n=0) %}{%- if tools is not none %}{%- for tool in tools %}"
       "{{- tool | tojson(indent=4) }}{%- set ns.n = ns.n + 1 %}{%- endfor %}{%- endif %}{%- for m in messages[1:] %}{%- if m.role == 'tool' and"
       " not ns.found %}{{- raise_exception('no tool before ' ~ loop.index0) }}{%- endif %}{{- m.content | trim | upper }}{%- endfor %}"
       "{{ strftime_now('%d %b %Y') }}"},
      {.name = "macros", .bytes = "{% macro show(x, depth=0) %}{% if depth < 3 %}[{{ x }}{{ show(x, depth + 1) }}]{% endif %}{% endmacro %}"
       "{% set parts = messages | map(attribute='content') | list %}{{ show(parts | join(', ')) }}{{ parts[-1].split(' ')[0].strip('a') }}"
       "{% filter upper %}{% generation %}x{% endgeneration %}{% endfilter %}{{ '%s-%d' | format('a', 3) }}{{ messages | length }}"
       "{% for k, v in messages[0].items() %}{{ k }}={{ v }}{% break %}{% endfor %}{{ {'a': [1, 2.5, none, true]} }}"}};
}

}  // namespace refinery::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::string_view kContext =
      R"({"bos_token":"<s>","eos_token":"</s>","add_generation_prompt":true,"tools":[{"type":"function","function":{"name":"f",)"
      R"("parameters":{"type":"object","properties":{"a":{"type":"string"}}}}}],"documents":null,"messages":[)"
      R"({"role":"system","content":"Be brief."},{"role":"user","content":"Hi, \"you\" 𝄞"},{"role":"assistant","content":"",)"
      R"("tool_calls":[{"function":{"name":"f","arguments":{"a":"b"}}}]},{"role":"tool","content":"42"},{"role":"user","content":"?"}]})";
  RbTemplate* chat_template = nullptr;
  RbString error{}, out{};
  if (RbTemplateNew({reinterpret_cast<const char*>(data), size}, &chat_template, &error) == 0) {
    RbString problem{};
    if (RbTemplateRender(chat_template, {kContext.data(), kContext.size()}, 1'721'952'000, &out, &problem) == 0) {
      ++refinery::fuzz::inputs_read;
      RbStringFree(&out);
    }
    RbStringFree(&problem);
    RbTemplateFree(chat_template);
  }
  RbStringFree(&error);
  return 0;
}
