//! Values as Python writes them: str(), repr() and json.dumps().

use crate::budget::{is_strict, BoundedText, MAX_DEPTH};
use minijinja::value::{Tuple, ValueKind};
use minijinja::{Error, ErrorKind, Value};
use std::fmt::Write;
use std::sync::OnceLock;

/// str(value).
pub fn python_str(value: &Value) -> Result<String, Error> {
    let mut out = BoundedText::default();
    write_str(&mut out, value)?;
    out.finish()
}

pub fn write_str(out: &mut BoundedText, value: &Value) -> Result<(), Error> {
    if value.is_undefined() {
        return if is_strict() { Err(Error::from(ErrorKind::UndefinedError)) } else { Ok(()) };
    }
    match value.as_str() {
        Some(text) => out.push(text),
        None => write_repr(out, value, 0)?,
    }
    Ok(())
}

/// repr(value).
pub fn write_repr(out: &mut BoundedText, value: &Value, depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(Error::new(ErrorKind::InvalidOperation, "a value is nested too deep to be written"));
    }
    if out.is_full() {
        return Ok(());
    }
    match value.kind() {
        ValueKind::Undefined => out.push("Undefined"),
        ValueKind::None => out.push("None"),
        ValueKind::Bool => out.push(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => write_number(out, value),
        ValueKind::String => write_quoted(out, value.as_str().unwrap_or_default()),
        ValueKind::Seq | ValueKind::Iterable => {
            let tuple = value.downcast_object_ref::<Tuple>().is_some();
            out.push(if tuple { "(" } else { "[" });
            let mut count = 0;
            for item in value.try_iter()? {
                if out.is_full() {
                    break;
                }
                if count > 0 {
                    out.push(", ");
                }
                write_repr(out, &item, depth + 1)?;
                count += 1;
            }
            out.push(if tuple && count == 1 {
                ",)"
            } else if tuple {
                ")"
            } else {
                "]"
            });
        }
        ValueKind::Map => {
            out.push("{");
            for (i, key) in value.try_iter()?.enumerate() {
                if out.is_full() {
                    break;
                }
                if i > 0 {
                    out.push(", ");
                }
                write_repr(out, &key, depth + 1)?;
                out.push(": ");
                write_repr(out, &value.get_item(&key)?, depth + 1)?;
            }
            out.push("}");
        }
        _ => {
            let _ = write!(out, "{value}");
        }
    }
    Ok(())
}

fn write_number(out: &mut BoundedText, value: &Value) {
    match f64::try_from(value.clone()) {
        Ok(number) if !value.is_integer() => out.push(&python_float(number)),
        _ => {
            let _ = write!(out, "{value}");
        }
    }
}

/// repr(float): the shortest digits, with an exponent from 1e16 on and below 1e-4.
pub fn python_float(number: f64) -> String {
    if number.is_nan() {
        return "nan".to_string();
    }
    if number.is_infinite() {
        return if number > 0.0 { "inf" } else { "-inf" }.to_string();
    }
    let scientific = format!("{number:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = format!("{number}");
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    format!("{mantissa}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

fn write_quoted(out: &mut BoundedText, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push_char(quote);
    for letter in text.chars() {
        match letter {
            '\\' => out.push("\\\\"),
            '\n' => out.push("\\n"),
            '\r' => out.push("\\r"),
            '\t' => out.push("\\t"),
            _ if letter == quote => {
                out.push_char('\\');
                out.push_char(letter);
            }
            ' '..='~' => out.push_char(letter),
            _ if letter as u32 > 0x7f && is_printable(letter) => out.push_char(letter),
            _ => {
                let code = letter as u32;
                out.push(&match code {
                    0..=0xff => format!("\\x{code:02x}"),
                    0x100..=0xffff => format!("\\u{code:04x}"),
                    _ => format!("\\U{code:08x}"),
                });
            }
        }
    }
    out.push_char(quote);
}

/// str.isprintable() of one letter: neither "Other" nor "Separator" but for the blank.
fn is_printable(letter: char) -> bool {
    static HIDDEN: OnceLock<Vec<(char, char)>> = OnceLock::new();
    let hidden = HIDDEN.get_or_init(|| {
        let parsed = regex_syntax::parse(r"[\p{C}\p{Z}]");
        match parsed.as_ref().map(|tree| tree.kind()) {
            Ok(regex_syntax::hir::HirKind::Class(regex_syntax::hir::Class::Unicode(class))) => {
                class.ranges().iter().map(|range| (range.start(), range.end())).collect()
            }
            _ => Vec::new(),
        }
    });
    let after = hidden.partition_point(|range| range.0 <= letter);
    letter == ' ' || after == 0 || hidden[after - 1].1 < letter
}

pub struct JsonStyle {
    pub indent: Option<String>,
    pub item: String,
    pub key: String,
    pub ensure_ascii: bool,
    pub sort_keys: bool,
}

/// json.dumps(value, ...).
pub fn python_json(value: &Value, style: &JsonStyle) -> Result<String, Error> {
    let mut writer = JsonWriter { out: BoundedText::default(), style };
    writer.write(value, 0)?;
    writer.out.finish()
}

struct JsonWriter<'a> {
    out: BoundedText,
    style: &'a JsonStyle,
}

impl JsonWriter<'_> {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson: the value is nested too deep"));
        }
        match value.kind() {
            ValueKind::None => self.out.push("null"),
            ValueKind::Bool => self.out.push(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.number(value),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => self.list(value, depth)?,
            ValueKind::Map => self.mapping(value, depth)?,
            other => {
                let message = format!("tojson: a value of the kind {other} is not JSON serializable");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        }
        Ok(())
    }

    fn number(&mut self, value: &Value) {
        match f64::try_from(value.clone()) {
            Ok(number) if !value.is_integer() && !number.is_finite() => {
                self.out.push(if number.is_nan() {
                    "NaN"
                } else if number > 0.0 {
                    "Infinity"
                } else {
                    "-Infinity"
                });
            }
            _ => write_number(&mut self.out, value),
        }
    }

    fn list(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        self.out.push("[");
        let mut count = 0;
        for item in value.try_iter()? {
            if self.out.is_full() {
                break;
            }
            self.start_item(count, depth + 1);
            self.write(&item, depth + 1)?;
            count += 1;
        }
        if count > 0 {
            self.new_line(depth);
        }
        self.out.push("]");
        Ok(())
    }

    fn mapping(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let mut keys: Vec<Value> = value.try_iter()?.collect();
        if self.style.sort_keys {
            keys.sort();
        }
        self.out.push("{");
        for (i, key) in keys.iter().enumerate() {
            if self.out.is_full() {
                break;
            }
            self.start_item(i, depth + 1);
            match key.kind() {
                ValueKind::String => self.string(key.as_str().unwrap_or_default()),
                ValueKind::None | ValueKind::Bool | ValueKind::Number => {
                    self.out.push("\"");
                    self.write(key, depth + 1)?;
                    self.out.push("\"");
                }
                other => {
                    let message = format!("tojson: keys must be str, int, float, bool or None, not {other}");
                    return Err(Error::new(ErrorKind::InvalidOperation, message));
                }
            }
            self.out.push(&self.style.key);
            self.write(&value.get_item(key)?, depth + 1)?;
        }
        if !keys.is_empty() {
            self.new_line(depth);
        }
        self.out.push("}");
        Ok(())
    }

    fn start_item(&mut self, index: usize, depth: usize) {
        if index > 0 {
            self.out.push(&self.style.item);
        }
        self.new_line(depth);
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = &self.style.indent {
            self.out.push("\n");
            (0..depth).for_each(|_| self.out.push(indent));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push("\"");
        for letter in text.chars() {
            match letter {
                '"' => self.out.push("\\\""),
                '\\' => self.out.push("\\\\"),
                '\n' => self.out.push("\\n"),
                '\r' => self.out.push("\\r"),
                '\t' => self.out.push("\\t"),
                '\u{8}' => self.out.push("\\b"),
                '\u{c}' => self.out.push("\\f"),
                '\0'..='\u{1f}' => self.escape(letter),
                ' '..='~' => self.out.push_char(letter),
                _ if self.style.ensure_ascii => self.escape(letter),
                _ => self.out.push_char(letter),
            }
        }
        self.out.push("\"");
    }

    fn escape(&mut self, letter: char) {
        for unit in letter.encode_utf16(&mut [0; 2]) {
            self.out.push(&format!("\\u{unit:04x}"));
        }
    }
}
