//! Python's methods of strings and lists where minijinja's differ, are missing or have no bound.

use crate::budget::charge;
use crate::python_filters::{
    capitalize, is_space, join, lower, pad, replace, split_lines, strip, upper, wrong, Outcome, Side,
};
use crate::python_operators::formatted;
use minijinja::formatting::FormatStyle;
use minijinja::value::{from_args, Tuple, ValueKind};
use minijinja::{Error, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

pub fn method(state: &mut State, value: &Value, name: &str, arguments: &[Value]) -> Outcome {
    match value.kind() {
        ValueKind::String => string_method(state, value, name, arguments),
        ValueKind::Seq if name == "index" => {
            let (wanted,): (&Value,) = from_args(arguments)?;
            let at = value.try_iter()?.position(|item| item == *wanted);
            at.map(Value::from).ok_or_else(|| wrong("index: the value is not in the list"))
        }
        _ => unknown_method_callback(state, value, name, arguments),
    }
}

fn string_method(state: &mut State, value: &Value, name: &str, arguments: &[Value]) -> Outcome {
    let text = value.as_str().unwrap_or_default();
    let letters_before = |at: usize| Value::from(text[..at].chars().count());
    let none = |done: Result<String, Error>| -> Outcome {
        let () = from_args(arguments)?;
        done.map(Value::from)
    };
    match name {
        "upper" => none(upper(text)),
        "lower" => none(lower(text)),
        "casefold" => none(lower(text).map(|text| text.replace('ß', "ss"))),
        "title" => none(title(text)),
        "capitalize" => none(capitalize(text)),
        "swapcase" => none(swap_case(text)),
        "strip" | "lstrip" | "rstrip" => {
            let (letters,): (Option<&str>,) = from_args(arguments)?;
            Ok(Value::from(strip(text, letters, name != "rstrip", name != "lstrip")))
        }
        "replace" => {
            let (old, new, count): (&str, &str, Option<i64>) = from_args(arguments)?;
            replace(text, old, new, count).map(Value::from)
        }
        "join" => {
            let (values,): (&Value,) = from_args(arguments)?;
            join(text, &mut values.try_iter()?.map(Ok))
        }
        "format" => formatted(FormatStyle::StrFormat, text, arguments.to_vec()),
        "split" => {
            charge(text.len() * 4)?;
            unknown_method_callback(state, value, name, arguments)
        }
        "rsplit" => rsplit(text, arguments),
        "splitlines" => {
            let (keep_ends,): (Option<bool>,) = from_args(arguments)?;
            charge(text.len() * 4)?;
            Ok(split_lines(text, keep_ends.unwrap_or(false)).into_iter().map(Value::from).collect())
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(arguments)?;
            let parts = if name == "partition" { text.split_once(separator) } else { text.rsplit_once(separator) };
            let parts = match parts {
                Some((before, after)) => [before, separator, after],
                None if name == "partition" => [text, "", ""],
                None => ["", "", text],
            };
            Ok(Value::from(Tuple::from(parts.map(Value::from))))
        }
        "index" | "rindex" => {
            let (part,): (&str,) = from_args(arguments)?;
            let at = if name == "index" { text.find(part) } else { text.rfind(part) };
            at.map(letters_before).ok_or_else(|| wrong(format!("{name}: substring not found")))
        }
        "zfill" => {
            let (width,): (usize,) = from_args(arguments)?;
            let sign = text.starts_with(['+', '-']) as usize;
            pad(&text[sign..], width.saturating_sub(sign), '0', Side::Left)
                .map(|rest| Value::from(text[..sign].to_string() + &rest))
        }
        "ljust" | "rjust" | "center" => {
            let (width, fill): (usize, Option<char>) = from_args(arguments)?;
            let side = match name {
                "ljust" => Side::Right,
                "rjust" => Side::Left,
                _ => Side::Both,
            };
            pad(text, width, fill.unwrap_or(' '), side).map(Value::from)
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(arguments)?;
            Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(arguments)?;
            Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)))
        }
        _ => unknown_method_callback(state, value, name, arguments),
    }
}

fn swap_case(text: &str) -> Result<String, Error> {
    charge(text.len() * 3)?;
    Ok(text
        .chars()
        .flat_map(|c| if c.is_uppercase() { c.to_lowercase().collect::<Vec<_>>() } else { c.to_uppercase().collect() })
        .collect())
}

fn rsplit(text: &str, arguments: &[Value]) -> Outcome {
    let (separator, count): (Option<&str>, Option<i64>) = from_args(arguments)?;
    charge(text.len() * 4)?;
    let count = count.and_then(|count| usize::try_from(count).ok()).unwrap_or(usize::MAX);
    let mut parts: Vec<&str> = Vec::new();
    match separator {
        Some("") => return Err(wrong("rsplit: empty separator")),
        Some(separator) => parts.extend(text.rsplitn(count.saturating_add(1), separator)),
        None => {
            let mut rest = strip(text, None, true, true);
            while parts.len() < count {
                let Some(at) = rest.rfind(is_space) else { break };
                let after = at + rest[at..].chars().next().map_or(1, char::len_utf8);
                parts.push(&rest[after..]);
                rest = strip(&rest[..at], None, false, true);
            }
            if !rest.is_empty() {
                parts.push(rest);
            }
        }
    }
    Ok(parts.into_iter().rev().map(Value::from).collect())
}

/// str.title(): a word begins after everything that has no case.
fn title(text: &str) -> Result<String, Error> {
    charge(text.len() * 3)?;
    let mut out = String::with_capacity(text.len());
    let mut word = String::new();
    for letter in text.chars() {
        // The digraphs in title form are cased too.
        if letter.is_uppercase() || letter.is_lowercase() || matches!(letter, 'ǅ' | 'ǈ' | 'ǋ' | 'ǲ') {
            word.push(letter);
        } else {
            out.push_str(&capitalize(&std::mem::take(&mut word))?);
            out.push(letter);
        }
    }
    out.push_str(&capitalize(&word)?);
    Ok(out)
}
