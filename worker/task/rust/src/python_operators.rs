//! Operators that make texts and lists, as Python has them and within the budget. chat_template.rs puts calls of these
//! functions in the place of minijinja's own instructions.

use crate::budget::{charge, charge_members, charge_shared, refused, BoundedText, MAX_DEPTH};
use crate::python_text::{python_str, write_str};
use minijinja::formatting::{format, FormatStyle};
use minijinja::value::{Kwargs, Rest, Tuple, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value};

pub const ADD: &str = "__refinery_add";
pub const MUL: &str = "__refinery_mul";
pub const REM: &str = "__refinery_rem";
pub const CONCAT: &str = "__refinery_concat";
pub const LIST: &str = "__refinery_list";
pub const TUPLE: &str = "__refinery_tuple";
pub const MAP: &str = "__refinery_map";
pub const TICK: &str = "__refinery_tick";

pub fn register(environment: &mut Environment) {
    environment.add_function(TICK, || charge(0));
    environment.add_function(ADD, |left: Value, right: Value| add(&left, &right));
    environment.add_function(MUL, |left: Value, right: Value| multiply(&left, &right));
    environment.add_function(REM, |left: Value, right: Value| remainder(&left, &right));
    environment.add_function(CONCAT, concatenate);
    environment.add_function(LIST, |items: Rest<Value>| measured(items.0.clone()).map(Value::from));
    environment.add_function(TUPLE, |items: Rest<Value>| {
        measured(items.0.clone()).map(|items| Value::from(Tuple::from(items)))
    });
    environment.add_function(MAP, |items: Rest<Value>| {
        let items = measured(items.0.clone())?;
        Ok(mapping_of(&items))
    });
    environment.add_function("dict", |value: Option<Value>, options: Kwargs| {
        let mut pairs = Vec::new();
        if let Some(value) = value {
            let mapping = value.kind() == ValueKind::Map;
            for item in value.try_iter()? {
                let (key, value) = if mapping {
                    (item.clone(), value.get_item(&item)?)
                } else {
                    (item.get_item_by_index(0)?, item.get_item_by_index(1)?)
                };
                pairs.extend([key, value]);
            }
        }
        for name in options.args() {
            pairs.extend([Value::from(name), options.peek::<Value>(name)?]);
        }
        let pairs = measured(pairs)?;
        Ok(mapping_of(&pairs))
    });
}

/// From key, value, key, value, ...
fn mapping_of(items: &[Value]) -> Value {
    Value::from_pairs(items.chunks_exact(2).map(|pair| (pair[0].clone(), pair[1].clone())))
}

/// Members of a container that is being made: lists within lists may name each other again and again, so that a small
/// template would make one without end.
fn measured(items: Vec<Value>) -> Result<Vec<Value>, Error> {
    let mut count = 0;
    for item in &items {
        charge(item.as_str().map_or(0, str::len))?;
        measure(item, 1, &mut count)?;
    }
    charge_members(count)?;
    Ok(items)
}

fn measure(value: &Value, depth: usize, count: &mut usize) -> Result<(), Error> {
    *count += 1;
    let mapping = match value.kind() {
        ValueKind::Seq => false,
        ValueKind::Map => true,
        _ => return Ok(()),
    };
    if depth > MAX_DEPTH {
        return Err(refused("a list nested too deep"));
    }
    charge_members(*count)?;
    for item in value.try_iter()? {
        if mapping {
            measure(&value.get_item(&item)?, depth + 1, count)?;
        } else {
            measure(&item, depth + 1, count)?;
        }
    }
    Ok(())
}

enum Number {
    Integer(i128),
    Float(f64),
}

/// Python's bool is a number too.
fn number_of(value: &Value) -> Option<Number> {
    match value.kind() {
        ValueKind::Bool => Some(Number::Integer(i128::from(value.is_true()))),
        ValueKind::Number if value.is_integer() => i128::try_from(value.clone()).ok().map(Number::Integer),
        ValueKind::Number => f64::try_from(value.clone()).ok().map(Number::Float),
        _ => None,
    }
}

fn is_list(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)
}

fn wrong(operator: &str, left: &Value, right: &Value) -> Error {
    let message = format!("tried to use {operator} operator on unsupported types {} and {}", left.kind(), right.kind());
    Error::new(ErrorKind::InvalidOperation, message)
}

fn integer(value: Option<i128>) -> Result<Value, Error> {
    let value = value.ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "the integer is too large"))?;
    Ok(i64::try_from(value).map_or_else(|_| Value::from(value), Value::from))
}

fn numbers(
    operator: &str,
    left: &Value,
    right: &Value,
    integers: fn(i128, i128) -> Option<i128>,
    floats: fn(f64, f64) -> f64,
) -> Result<Value, Error> {
    match (number_of(left), number_of(right)) {
        (Some(Number::Integer(a)), Some(Number::Integer(b))) => integer(integers(a, b)),
        (Some(Number::Integer(a)), Some(Number::Float(b))) => Ok(Value::from(floats(a as f64, b))),
        (Some(Number::Float(a)), Some(Number::Integer(b))) => Ok(Value::from(floats(a, b as f64))),
        (Some(Number::Float(a)), Some(Number::Float(b))) => Ok(Value::from(floats(a, b))),
        _ => Err(wrong(operator, left, right)),
    }
}

fn add(left: &Value, right: &Value) -> Result<Value, Error> {
    if let (Some(a), Some(b)) = (left.as_str(), right.as_str()) {
        charge(a.len() + b.len())?;
        return Ok(Value::from([a, b].concat()));
    }
    if is_list(left) && is_list(right) {
        let mut items = Vec::new();
        for item in left.try_iter()?.chain(right.try_iter()?) {
            items.push(item);
            if items.len() % 1024 == 0 {
                charge_members(items.len())?;
            }
        }
        charge_members(items.len())?;
        let tuples = [left, right].map(|value| value.downcast_object_ref::<Tuple>().is_some());
        return match tuples {
            [true, true] => Ok(Value::from(Tuple::from(items))),
            [false, false] => Ok(Value::from(items)),
            _ => Err(wrong("+", left, right)),
        };
    }
    numbers("+", left, right, i128::checked_add, |a, b| a + b)
}

fn multiply(left: &Value, right: &Value) -> Result<Value, Error> {
    for (value, times) in [(left, right), (right, left)] {
        let Some(Number::Integer(times)) = number_of(times) else { continue };
        let times = usize::try_from(times.max(0)).unwrap_or(usize::MAX);
        if let Some(text) = value.as_str() {
            charge(text.len().saturating_mul(times))?;
            return Ok(Value::from(text.repeat(times)));
        }
        if is_list(value) {
            let items: Vec<Value> = value.try_iter()?.collect();
            charge_members(items.len().saturating_mul(times))?;
            let texts: usize = items.iter().filter_map(Value::as_str).map(str::len).sum();
            charge_shared(texts.saturating_mul(times))?;
            let repeated: Vec<Value> = (0..times).flat_map(|_| items.iter().cloned()).collect();
            let tuple = value.downcast_object_ref::<Tuple>().is_some();
            return Ok(if tuple { Value::from(Tuple::from(repeated)) } else { Value::from(repeated) });
        }
    }
    numbers("*", left, right, i128::checked_mul, |a, b| a * b)
}

fn remainder(left: &Value, right: &Value) -> Result<Value, Error> {
    if let Some(text) = left.as_str() {
        return match right.downcast_object_ref::<Tuple>() {
            Some(_) => percent(text, right.try_iter()?.collect()),
            None => percent(text, vec![right.clone()]),
        };
    }
    let zero =
        matches!(number_of(right), Some(Number::Integer(0))) || matches!(number_of(right), Some(Number::Float(0.0)));
    if zero && number_of(left).is_some() {
        return Err(Error::new(ErrorKind::InvalidOperation, "modulo by zero"));
    }
    // The remainder has the sign of the divisor.
    numbers(
        "%",
        left,
        right,
        |a, b| a.checked_rem(b).map(|r| if r != 0 && (r < 0) != (b < 0) { r + b } else { r }),
        |a, b| {
            let r = a % b;
            if r != 0.0 && (r < 0.0) != (b < 0.0) {
                r + b
            } else {
                r
            }
        },
    )
}

fn concatenate(left: Value, right: Value) -> Result<Value, Error> {
    let mut out = BoundedText::default();
    write_str(&mut out, &left)?;
    write_str(&mut out, &right)?;
    out.finish().map(Value::from)
}

/// text % arguments.
pub fn percent(text: &str, arguments: Vec<Value>) -> Result<Value, Error> {
    formatted(FormatStyle::Printf, text, arguments)
}

/// Formats after a look at widths, which could ask for any size.
pub fn formatted(style: FormatStyle, text: &str, arguments: Vec<Value>) -> Result<Value, Error> {
    let mut digits = 0;
    for byte in text.bytes() {
        digits = if byte.is_ascii_digit() { digits + 1 } else { 0 };
        if digits > 4 {
            return Err(refused("a format with a number above 9999"));
        }
    }
    let widths_are_arguments = text.contains('*') || text.contains(":{");
    let mut shown = Vec::with_capacity(arguments.len());
    let mut size = text.len();
    for argument in arguments {
        if widths_are_arguments && i64::try_from(argument.clone()).is_ok_and(|width| width.abs() > 9999) {
            return Err(refused("a format with a number above 9999"));
        }
        // Texts and numbers may have any conversion; all else is shown as str() shows it.
        let argument = match argument.kind() {
            ValueKind::Number | ValueKind::String | ValueKind::Map if style == FormatStyle::Printf => argument,
            ValueKind::Number | ValueKind::String => argument,
            _ if Kwargs::try_from(argument.clone()).is_ok() => argument,
            _ => Value::from(python_str(&argument)?),
        };
        size += argument.as_str().map_or(32, str::len);
        shown.push(argument);
    }
    // A format may name an argument again and again.
    charge(size.saturating_mul(text.matches(['%', '{']).count().max(1)).min(64 << 20) / 4)?;
    let out = format(style, text, &shown)?;
    charge(out.len())?;
    Ok(Value::from(out))
}
