//! Chat templates as transformers renders them (jinja2 with trim_blocks and lstrip_blocks), on minijinja.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, UndefinedBehavior, Value};
use serde_json::Value as Json;

/// Instructions that one rendering may use: a template from a model folder must not hang the program.
const FUEL: u64 = 20_000_000;
const NAME: &str = "chat_template";
/// The variable that carries the clock from `render` to `strftime_now`.
const CLOCK: &str = "__refinery_now_seconds";

pub struct ChatTemplate {
    environment: Environment<'static>,
}

impl ChatTemplate {
    pub fn compile(source: &str) -> Result<Self, String> {
        let mut environment = Environment::new();
        let mut syntax = SyntaxConfig::builder();
        syntax.trim_blocks(true).lstrip_blocks(true);
        environment.set_syntax(syntax.build().map_err(|error| describe(&error))?);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_fuel(Some(FUEL));
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", to_json);
        environment
            .add_template_owned(NAME, replace_generation_tags(source))
            .map_err(|error| describe(&error))?;
        Ok(Self { environment })
    }

    pub fn render(&self, context_json: &str, now_seconds: i64) -> Result<String, String> {
        let mut context: Json =
            serde_json::from_str(context_json).map_err(|error| format!("template variables: {error}"))?;
        let variables = context.as_object_mut().ok_or("template variables must be a JSON object")?;
        variables.insert(CLOCK.to_string(), Json::from(now_seconds));
        let template = self.environment.get_template(NAME).map_err(|error| describe(&error))?;
        template.render(Value::from(Serde(&context))).map_err(|error| describe(&error))
    }
}

/// The error and what caused it, in one line.
fn describe(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// `{% generation %}` marks what an assistant said; for rendering it is a block that always runs.
fn replace_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let inner = &rest[start + 2..start + length];
        let core = inner.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']);
        let replacement = match core.trim() {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        out.push_str(&rest[..start + 2]);
        match replacement {
            Some(text) => out.push_str(&inner.replacen(core.trim(), text, 1)),
            None => out.push_str(inner),
        }
        out.push_str("%}");
        rest = &rest[start + length + 2..];
    }
    out.push_str(rest);
    out
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// C's strftime over the clock of this rendering, in UTC.
fn strftime_now(state: &State, format: String) -> Result<String, Error> {
    let seconds = state.lookup(CLOCK).and_then(|value| i64::try_from(value).ok()).unwrap_or(0);
    let invalid = || Error::new(ErrorKind::InvalidOperation, "strftime_now: format not understood");
    if format.is_empty() {
        return Ok(format);
    }
    // The trailing mark tells an empty result from a buffer that is too small.
    let pattern = std::ffi::CString::new(format + "|").map_err(|_| invalid())?;
    let mut buffer = vec![0u8; 512];
    let size = unsafe {
        let clock = seconds as libc::time_t;
        let mut parts: libc::tm = std::mem::zeroed();
        if libc::gmtime_r(&clock, &mut parts).is_null() {
            return Err(invalid());
        }
        libc::strftime(buffer.as_mut_ptr() as *mut libc::c_char, buffer.len(), pattern.as_ptr(), &parts)
    };
    if size == 0 {
        return Err(invalid());
    }
    buffer.truncate(size - 1);
    String::from_utf8(buffer).map_err(|_| invalid())
}

/// Python's json.dumps(value, ensure_ascii=False, ...): jinja2's own filter would escape HTML.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let failed = |error: serde_json::Error| Error::new(ErrorKind::InvalidOperation, format!("tojson: {error}"));
    let ensure_ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let indent = options.get::<Option<usize>>("indent")?;
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let separators = options.get::<Option<Vec<String>>>("separators")?;
    options.assert_all_used()?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "tojson: separators must be a pair")),
        None => (if indent.is_some() { "," } else { ", " }.to_string(), ": ".to_string()),
    };
    let json = serde_json::to_value(value).map_err(failed)?;
    let indent = indent.map(|n| n.min(64));
    let mut writer = JsonWriter { out: String::new(), indent, item, key, ensure_ascii, sort_keys };
    writer.write(&json, 0);
    Ok(Value::from_safe_string(writer.out))
}

struct JsonWriter {
    out: String,
    indent: Option<usize>,
    item: String,
    key: String,
    ensure_ascii: bool,
    sort_keys: bool,
}

impl JsonWriter {
    fn write(&mut self, json: &Json, depth: usize) {
        match json {
            Json::Array(items) if !items.is_empty() => {
                self.out.push('[');
                for (i, item) in items.iter().enumerate() {
                    self.start_item(i, depth + 1);
                    self.write(item, depth + 1);
                }
                self.new_line(depth);
                self.out.push(']');
            }
            Json::Object(map) if !map.is_empty() => {
                let mut entries: Vec<(&String, &Json)> = map.iter().collect();
                if self.sort_keys {
                    entries.sort_by_key(|entry| entry.0);
                }
                self.out.push('{');
                for (i, (name, value)) in entries.into_iter().enumerate() {
                    self.start_item(i, depth + 1);
                    self.write_string(name);
                    self.out.push_str(&self.key);
                    self.write(value, depth + 1);
                }
                self.new_line(depth);
                self.out.push('}');
            }
            Json::String(text) => self.write_string(text),
            other => self.out.push_str(&other.to_string()),
        }
    }

    fn start_item(&mut self, index: usize, depth: usize) {
        if index > 0 {
            self.out.push_str(&self.item);
        }
        self.new_line(depth);
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(width) = self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', width * depth));
        }
    }

    fn write_string(&mut self, text: &str) {
        let quoted = Json::from(text).to_string();
        if !self.ensure_ascii {
            self.out.push_str(&quoted);
            return;
        }
        for unit in quoted.encode_utf16() {
            match u8::try_from(unit) {
                Ok(byte) if byte.is_ascii() => self.out.push(byte as char),
                _ => self.out.push_str(&format!("\\u{unit:04x}")),
            }
        }
    }
}
