//! jinja2's filters where minijinja's differ, are missing or have no bound.

use crate::budget::{charge, charge_members, charge_shared, BoundedText};
use crate::python_methods;
use crate::python_operators::percent;
use crate::python_text::{python_float, python_json, python_str, write_str, JsonStyle};
use minijinja::value::{Kwargs, Rest, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, State, Value};

pub type Outcome = Result<Value, Error>;

pub fn register(environment: &mut Environment) {
    // Not in jinja2.
    ["chain", "zip", "lines", "bool", "split", "pprint"].iter().for_each(|name| environment.remove_filter(name));
    environment.add_filter("tojson", to_json);
    environment.add_filter("string", |value: Value| python_str(&value));
    environment.add_filter("upper", |value: Value| python_str(&value).and_then(|text| upper(&text)));
    environment.add_filter("lower", |value: Value| python_str(&value).and_then(|text| lower(&text)));
    environment.add_filter("capitalize", |value: Value| python_str(&value).and_then(|text| capitalize(&text)));
    environment.add_filter("trim", |value: Value, letters: Option<String>| {
        python_str(&value).map(|text| strip(&text, letters.as_deref(), true, true).to_string())
    });
    environment.add_filter("replace", |value: Value, old: String, new: String, count: Option<i64>| {
        python_str(&value).and_then(|text| replace(&text, &old, &new, count))
    });
    environment.add_filter("join", join_filter);
    environment.add_filter("indent", indent);
    environment.add_filter("int", to_int);
    environment.add_filter("float", to_float);
    environment.add_filter("list", |value: Value| list_of(&value).map(Value::from));
    environment.add_filter("wordcount", |value: String| value.split(is_space).filter(|word| !word.is_empty()).count());
    environment.add_filter("center", |value: Value, width: Option<usize>| {
        python_str(&value).and_then(|text| pad(&text, width.unwrap_or(80), ' ', Side::Both))
    });
    environment.add_filter("truncate", truncate);
    environment.add_filter("urlencode", |value: Value| python_str(&value).and_then(|text| urlencode(&text)));
    for name in ["e", "escape"] {
        environment.add_filter(name, |value: Value| {
            let text = python_str(&value)?;
            if value.is_safe() {
                Ok(value)
            } else {
                escape(&text).map(Value::from_safe_string)
            }
        });
    }
    environment.add_filter("forceescape", |value: Value| python_str(&value).and_then(|text| escape(&text)));
    environment
        .add_filter("format", |value: String, arguments: Rest<ValueOrKwargs>| percent(&value, arguments.into_values()));
    for (name, filter) in [
        ("sort", Value::from_function(minijinja::filters::sort)),
        ("unique", Value::from_function(minijinja::filters::unique)),
        ("min", Value::from_function(minijinja::filters::min)),
        ("max", Value::from_function(minijinja::filters::max)),
        ("sum", Value::from_function(minijinja::filters::sum)),
        ("groupby", Value::from_function(minijinja::filters::groupby)),
    ] {
        environment.add_filter(name, move |state: &mut State, arguments: Rest<ValueOrKwargs>| {
            let mut arguments = arguments.into_values();
            // Counted and made a list before the filter walks over it, perhaps many times.
            if let Some(first) = arguments.first_mut().filter(|value| !value.is_undefined()) {
                *first = Value::from(list_of(first)?);
            }
            filter.call(state, &arguments)
        });
    }
    environment.add_filter("batch", |state: &State, value: Value, count: usize, fill: Option<Value>| {
        charge_members(count)?;
        minijinja::filters::batch(state, value, count, fill)
    });
    environment.add_filter("slice", |state: &State, value: Value, count: usize, fill: Option<Value>| {
        charge_members(count)?;
        minijinja::filters::slice(state, value, count, fill)
    });
    environment.add_test("sequence", |value: Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String)
    });
    environment.add_test("callable", |value: Value| value.kind() == ValueKind::Plain);
    environment.add_function("cycler", |items: Rest<Value>| minijinja_contrib::globals::cycler(items.0.clone()));
    environment.add_function("joiner", |separator: Option<Value>| minijinja_contrib::globals::joiner(separator));
    environment.set_unknown_method_callback(python_methods::method);
}

pub fn wrong(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// json.dumps with the arguments of transformers' filter.
fn to_json(value: Value, given: Rest<ValueOrKwargs>) -> Outcome {
    let given = given.into_values();
    if value.is_undefined() {
        return Err(wrong("tojson: Undefined is not JSON serializable"));
    }
    let (options, given) = match given.split_last().map(|(last, rest)| (Kwargs::try_from(last.clone()), rest)) {
        Some((Ok(options), rest)) => (options, rest),
        _ => (Kwargs::from_iter::<[(String, Value); 0]>([]), &given[..]),
    };
    if given.len() > 4 {
        return Err(wrong("tojson takes at most four arguments"));
    }
    let option = |index: usize, name: &str| -> Result<Option<Value>, Error> {
        let value =
            given.get(index).cloned().map_or_else(|| options.get::<Option<Value>>(name), |value| Ok(Some(value)))?;
        Ok(value.filter(|value| !value.is_none()))
    };
    let is_true = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let ensure_ascii = is_true(option(0, "ensure_ascii")?);
    let indent = option(1, "indent")?;
    let separators = option(2, "separators")?;
    let sort_keys = is_true(option(3, "sort_keys")?);
    options.assert_all_used()?;
    let indent = match indent {
        None => None,
        Some(value) => Some(match value.as_str() {
            Some(text) => text.to_string(),
            None => " ".repeat(i64::try_from(value)?.clamp(0, 1000) as usize),
        }),
    };
    let (item, key) = match separators {
        None => (if indent.is_some() { "," } else { ", " }.to_string(), ": ".to_string()),
        Some(pair) => {
            let pair: Vec<Value> = pair.try_iter()?.collect();
            match pair.as_slice() {
                [item, key] => (python_str(item)?, python_str(key)?),
                _ => return Err(wrong("tojson: separators must be a pair")),
            }
        }
    };
    python_json(&value, &JsonStyle { indent, item, key, ensure_ascii, sort_keys }).map(Value::from)
}

pub fn upper(text: &str) -> Result<String, Error> {
    charge(text.len() * 3)?;
    Ok(text.to_uppercase())
}

pub fn lower(text: &str) -> Result<String, Error> {
    charge(text.len() * 3)?;
    Ok(text.to_lowercase())
}

/// A letter as it begins a word: the four digraphs have a form of their own, "ß" gives "Ss".
fn title_letter(letter: char) -> String {
    match letter {
        'Ǆ' | 'ǅ' | 'ǆ' => "ǅ".to_string(),
        'Ǉ' | 'ǈ' | 'ǉ' => "ǈ".to_string(),
        'Ǌ' | 'ǋ' | 'ǌ' => "ǋ".to_string(),
        'Ǳ' | 'ǲ' | 'ǳ' => "ǲ".to_string(),
        _ => {
            let mut letters = letter.to_uppercase();
            let first = letters.next().map(String::from).unwrap_or_default();
            first + &letters.collect::<String>().to_lowercase()
        }
    }
}

pub fn capitalize(text: &str) -> Result<String, Error> {
    charge(text.len() * 3)?;
    let mut letters = text.chars();
    let first = letters.next().map(title_letter).unwrap_or_default();
    // Lowered with the first letter before them, which decides the form of a final sigma.
    let lowered = text.to_lowercase();
    let skip = text.chars().next().map_or(0, |letter| letter.to_lowercase().map(char::len_utf8).sum());
    Ok(first + lowered.get(skip..).unwrap_or_default())
}

pub fn is_space(letter: char) -> bool {
    letter.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&letter)
}

pub fn strip<'a>(text: &'a str, letters: Option<&str>, left: bool, right: bool) -> &'a str {
    let matches = |letter: char| letters.map_or_else(|| is_space(letter), |letters| letters.contains(letter));
    let text = if left { text.trim_start_matches(matches) } else { text };
    if right {
        text.trim_end_matches(matches)
    } else {
        text
    }
}

pub fn replace(text: &str, old: &str, new: &str, count: Option<i64>) -> Result<String, Error> {
    let count = count.and_then(|count| usize::try_from(count).ok()).unwrap_or(usize::MAX);
    let found = text.matches(old).count().min(count);
    charge(text.len().saturating_add(found.saturating_mul(new.len())))?;
    Ok(text.replacen(old, new, found))
}

pub fn join(separator: &str, values: &mut dyn Iterator<Item = Result<Value, Error>>) -> Outcome {
    let mut out = BoundedText::default();
    for (i, value) in values.enumerate() {
        if i > 0 {
            out.push(separator);
        }
        write_str(&mut out, &value?)?;
        if out.is_full() {
            break;
        }
    }
    out.finish().map(Value::from)
}

fn join_filter(value: Value, separator: Option<String>, attribute: Option<String>, options: Kwargs) -> Outcome {
    let separator = separator.or(options.get::<Option<String>>("d")?).unwrap_or_default();
    let attribute = attribute.or(options.get::<Option<String>>("attribute")?);
    options.assert_all_used()?;
    let mut values = value.try_iter()?.map(|item| match &attribute {
        Some(name) => item.get_attr(name),
        None => Ok(item),
    });
    join(&separator, &mut values)
}

/// str.splitlines().
pub fn split_lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let mut lines = Vec::new();
    let mut rest = text;
    let ends = |c: char| {
        matches!(c, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}')
    };
    while let Some(at) = rest.find(ends) {
        let mut next = at + rest[at..].chars().next().map_or(1, char::len_utf8);
        if rest[at..].starts_with("\r\n") {
            next = at + 2;
        }
        lines.push(&rest[..if keep_ends { next } else { at }]);
        rest = &rest[next..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

fn indent(value: Value, width: Option<Value>, first: Option<bool>, blank: Option<bool>, options: Kwargs) -> Outcome {
    let width = if width.is_some() { width } else { options.get::<Option<Value>>("width")? };
    let first = first.or(options.get("first")?).unwrap_or(false);
    let blank = blank.or(options.get("blank")?).unwrap_or(false);
    options.assert_all_used()?;
    let margin = match width {
        None => "    ".to_string(),
        Some(width) => match width.as_str() {
            Some(text) => text.to_string(),
            None => " ".repeat(i64::try_from(width)?.clamp(0, 10_000) as usize),
        },
    };
    let text = python_str(&value)? + "\n";
    let mut out = BoundedText::default();
    if first {
        out.push(&margin);
    }
    for (i, line) in split_lines(&text, false).into_iter().enumerate() {
        if i > 0 {
            out.push("\n");
            if blank || !line.is_empty() {
                out.push(&margin);
            }
        }
        out.push(line);
    }
    out.finish().map(Value::from)
}

fn to_int(value: Value, default: Option<Value>, base: Option<u32>, options: Kwargs) -> Outcome {
    let default = default.or(options.get("default")?).unwrap_or(Value::from(0));
    let base = base.or(options.get("base")?).unwrap_or(10);
    options.assert_all_used()?;
    if value.kind() == ValueKind::Bool {
        return Ok(Value::from(i64::from(value.is_true())));
    }
    if value.kind() == ValueKind::Number && value.is_integer() {
        return Ok(value);
    }
    let number = match value.as_str() {
        Some(text) => {
            let text = strip(text, None, true, true).replace('_', "");
            let (body, base) = match text.get(..2).map(str::to_lowercase).as_deref() {
                Some("0x") if base == 16 => (&text[2..], 16),
                Some("0o") if base == 8 => (&text[2..], 8),
                Some("0b") if base == 2 => (&text[2..], 2),
                _ => (text.as_str(), base),
            };
            if let Ok(number) = i128::from_str_radix(body, base.clamp(2, 36)) {
                return Ok(i64::try_from(number).map_or_else(|_| Value::from(number), Value::from));
            }
            text.parse::<f64>().ok()
        }
        None => f64::try_from(value).ok(),
    };
    Ok(match number {
        Some(number) if number.is_finite() && number.abs() < 1e18 => Value::from(number as i64),
        Some(number) if number.is_finite() => Value::from(number as i128),
        _ => default,
    })
}

fn to_float(value: Value, default: Option<Value>, options: Kwargs) -> Outcome {
    let default = default.or(options.get("default")?).unwrap_or(Value::from(0.0));
    options.assert_all_used()?;
    let number = match value.as_str() {
        Some(text) => strip(text, None, true, true).replace('_', "").parse::<f64>().ok(),
        None if value.kind() == ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        None => f64::try_from(value).ok(),
    };
    Ok(number.map_or(default, Value::from))
}

fn list_of(value: &Value) -> Result<Vec<Value>, Error> {
    if let Some(text) = value.as_str() {
        charge_members(text.chars().count())?;
        return Ok(text.chars().map(Value::from).collect());
    }
    let mut items = Vec::new();
    for item in value.try_iter()? {
        charge_shared(item.as_str().map_or(0, str::len))?;
        items.push(item);
        if items.len() % 1024 == 0 {
            charge_members(items.len())?;
        }
    }
    charge_members(items.len())?;
    Ok(items)
}

pub enum Side {
    Left,
    Right,
    Both,
}

/// Fills with `fill` up to `width` letters on the given side of the text.
pub fn pad(text: &str, width: usize, fill: char, side: Side) -> Result<String, Error> {
    let missing = width.saturating_sub(text.chars().count());
    charge(text.len().saturating_add(missing.saturating_mul(fill.len_utf8())))?;
    let left = match side {
        Side::Left => missing,
        Side::Right => 0,
        // As CPython places the odd letter.
        Side::Both => missing / 2 + (missing & width & 1),
    };
    let repeat = |count: usize| std::iter::repeat_n(fill, count).collect::<String>();
    Ok(repeat(left) + text + &repeat(missing - left))
}

fn truncate(
    value: Value,
    length: Option<usize>,
    kill_words: Option<bool>,
    end: Option<String>,
    options: Kwargs,
) -> Outcome {
    let length = length.or(options.get("length")?).unwrap_or(255);
    let kill_words = kill_words.or(options.get("killwords")?).unwrap_or(false);
    let end = end.or(options.get("end")?).unwrap_or("...".to_string());
    let leeway = options.get::<Option<usize>>("leeway")?.unwrap_or(5);
    options.assert_all_used()?;
    let text = python_str(&value)?;
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(Value::from(text));
    }
    let kept: String = text.chars().take(length.saturating_sub(end.chars().count())).collect();
    charge(kept.len() + end.len())?;
    if kill_words {
        return Ok(Value::from(kept + &end));
    }
    Ok(Value::from(kept.rsplit_once(' ').map_or(kept.as_str(), |(words, _)| words).to_string() + &end))
}

fn urlencode(text: &str) -> Result<String, Error> {
    charge(text.len() * 3)?;
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' | b'/' => out.push(byte as char),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    Ok(out)
}

fn escape(text: &str) -> Result<String, Error> {
    charge(text.len() * 5)?;
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    Ok(text.replace('"', "&#34;").replace('\'', "&#39;"))
}

/// What `{{ value }}` writes.
pub fn shown(value: &Value) -> Result<String, Error> {
    if value.is_undefined() {
        return Ok(String::new()); // strict prompts were checked before
    }
    match f64::try_from(value.clone()) {
        Ok(number) if value.kind() == ValueKind::Number && !value.is_integer() => Ok(python_float(number)),
        _ => python_str(value),
    }
}
