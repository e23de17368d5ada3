//! Chat templates as transformers renders them (jinja2 with trim_blocks and lstrip_blocks), on minijinja.
//!
//! Operators that make texts and lists are replaced by calls of python_operators.rs after the template is compiled, so
//! that they do what Python's do and stay within the budget.

use crate::{budget, python_filters, python_operators};
use minijinja::machinery::{self, CodeGenerator, Instruction, Instructions, Token};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, UndefinedBehavior, Value};
use serde_json::Value as Json;
use std::collections::BTreeMap;

const NAME: &str = "chat_template";
/// The variable that carries the clock from `render` to `strftime_now`.
const CLOCK: &str = "__refinery_now_seconds";
const MAX_SOURCE_BYTES: usize = 1 << 20;
const MAX_CONTEXT_BYTES: usize = 64 << 20;
/// Text of the template that instructions may copy in all: what a loop repeats.
const MAX_COPIED_BYTES: u64 = 256 << 20;
const MAX_EXPRESSION_TOKENS: u128 = 20_000;
/// Values that hold one another are freed by recursion. Only reserved: a rendering uses what it needs.
const STACK_BYTES: usize = 512 << 20;

pub struct ChatTemplate {
    // Both borrow from `source`, which therefore comes last: fields are dropped in order.
    instructions: Instructions<'static>,
    blocks: BTreeMap<&'static str, Instructions<'static>>,
    environment: Environment<'static>,
    strict: bool,
    _source: Box<str>,
}

impl ChatTemplate {
    pub fn compile(source: &str) -> Result<Self, String> {
        let mut syntax = SyntaxConfig::builder();
        syntax.trim_blocks(true).lstrip_blocks(true);
        let syntax = syntax.build().map_err(|error| describe(&error))?;
        with_deep_stack(|| Self::compile_with(&replace_generation_tags(source), syntax, false))
    }

    /// A prompt: no white space is trimmed, and a variable that is not there is an error.
    pub fn compile_plain(source: &str) -> Result<Self, String> {
        let mut syntax = SyntaxConfig::builder();
        syntax.keep_trailing_newline(true);
        let syntax = syntax.build().map_err(|error| describe(&error))?;
        with_deep_stack(|| Self::compile_with(source, syntax, true))
    }

    fn compile_with(source: &str, syntax: SyntaxConfig, strict: bool) -> Result<Self, String> {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(format!("the template has {} bytes (at most {MAX_SOURCE_BYTES})", source.len()));
        }
        let owned: Box<str> = source.into();
        // The text lives on the heap and as long as the instructions that borrow from it (see the struct).
        let text: &'static str = unsafe { &*(&*owned as *const str) };
        check_constants(text, &syntax).map_err(|error| describe(&error))?;
        let tree = machinery::parse(text, NAME, syntax).map_err(|error| describe(&error))?;
        let mut generator = CodeGenerator::new(NAME, text);
        generator.compile_stmt(&tree);
        let (instructions, mut blocks) = generator.finish();
        let (instructions, mut longest) = rewrite(&instructions, text);
        for block in blocks.values_mut() {
            let size;
            (*block, size) = rewrite(block, text);
            longest = longest.max(size);
        }
        let fuel = budget::FUEL.min(MAX_COPIED_BYTES / longest.max(1) as u64);
        Ok(Self { instructions, blocks, environment: environment(fuel, strict), strict, _source: owned })
    }

    pub fn render(&self, context_json: &str, now_seconds: i64) -> Result<String, String> {
        if context_json.len() > MAX_CONTEXT_BYTES {
            return Err(format!("the messages have {} bytes (at most {MAX_CONTEXT_BYTES})", context_json.len()));
        }
        with_deep_stack(|| self.render_here(context_json, now_seconds))
    }

    fn render_here(&self, context_json: &str, now_seconds: i64) -> Result<String, String> {
        let mut context: Json =
            serde_json::from_str(context_json).map_err(|error| format!("template variables: {error}"))?;
        let variables = context.as_object_mut().ok_or("template variables must be a JSON object")?;
        variables.insert(CLOCK.to_string(), Json::from(now_seconds));
        budget::start(self.strict);
        let mut text = String::new();
        {
            let mut out = machinery::make_string_output(&mut text);
            machinery::eval(
                &self.environment,
                &self.instructions,
                Value::from(Serde(&context)),
                &self.blocks,
                &mut out,
                AutoEscape::None,
            )
            .map_err(|error| describe(&error))?;
        }
        if text.len() > budget::MAX_TEXT_BYTES {
            return Err(describe(&budget::refused("a text of more than 16 MiB")));
        }
        Ok(text)
    }
}

fn environment(fuel: u64, strict: bool) -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(if strict { UndefinedBehavior::Strict } else { UndefinedBehavior::Lenient });
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_fuel(Some(fuel));
    environment.set_formatter(|out, _state, value| {
        let text = python_filters::shown(value)?;
        out.write_str(&text).map_err(Error::from)
    });
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    python_filters::register(&mut environment);
    python_operators::register(&mut environment);
    environment
}

/// Puts calls of our own operators in the place of instructions that make values (both take as many values from the
/// stack and leave one), and a look at the clock after each that may take long. Returns the size of the longest piece of
/// plain text too.
fn rewrite<'a>(old: &Instructions<'a>, source: &'a str) -> (Instructions<'a>, usize) {
    let mut longest = 0;
    let mut places = Vec::new(); // of the old instructions among the new
    let mut length = 0;
    while let Some(instruction) = old.get(places.len() as u32) {
        places.push(length);
        length += if takes_long(instruction) { 3 } else { 1 };
    }
    places.push(length);
    let mut new = Instructions::new(NAME, source);
    for index in 0..places.len() as u32 - 1 {
        let (Some(instruction), span) = (old.get(index), old.get_span(index)) else { break };
        let mut instruction = replaced(instruction);
        match &mut instruction {
            Instruction::EmitRaw(text) => longest = longest.max(text.len()),
            Instruction::Iterate(target)
            | Instruction::Jump(target)
            | Instruction::JumpIfFalse(target)
            | Instruction::JumpIfFalseOrPop(target)
            | Instruction::JumpIfTrueOrPop(target)
            | Instruction::BuildMacro(_, target, _) => *target = places[*target as usize],
            _ => {}
        }
        let ticks = old.get(index).is_some_and(takes_long);
        let line = old.get_line(index).unwrap_or(0) as u16;
        for instruction in std::iter::once(instruction).chain(ticks.then(|| TICK.clone()).into_iter().flatten()) {
            match span {
                Some(span) => new.add_with_span(instruction, span),
                None => new.add_with_line(instruction, line),
            };
        }
    }
    (new, longest)
}

const TICK: [Instruction<'static>; 2] =
    [Instruction::CallFunction(python_operators::TICK, Some(0)), Instruction::DiscardTop];

fn takes_long(instruction: &Instruction) -> bool {
    use Instruction::{ApplyFilter, CallMethod, Eq, Gt, Gte, In, Lt, Lte, Ne, PerformTest, Slice};
    matches!(
        instruction,
        ApplyFilter(..) | CallMethod(..) | Eq | Gt | Gte | In | Lt | Lte | Ne | PerformTest(..) | Slice
    )
}

fn replaced<'a>(instruction: &Instruction<'a>) -> Instruction<'a> {
    let call =
        |name: &'static str, count: usize| u16::try_from(count).ok().map(|n| Instruction::CallFunction(name, Some(n)));
    let replacement = match instruction {
        Instruction::Add => call(python_operators::ADD, 2),
        Instruction::Mul => call(python_operators::MUL, 2),
        Instruction::Rem => call(python_operators::REM, 2),
        Instruction::StringConcat => call(python_operators::CONCAT, 2),
        Instruction::BuildList(Some(count)) => call(python_operators::LIST, *count),
        Instruction::BuildTuple(Some(count)) => call(python_operators::TUPLE, *count),
        Instruction::BuildMap(count) => call(python_operators::MAP, count.saturating_mul(2)),
        _ => None,
    };
    replacement.unwrap_or_else(|| instruction.clone())
}

/// Constant expressions are computed while the template is compiled, without a bound: "a" * 100000000.
fn check_constants(source: &str, syntax: &SyntaxConfig) -> Result<(), Error> {
    let (mut repeats, mut text, mut product, mut tokens) = (false, false, 1u128, 0u128);
    for token in machinery::tokenize(source, false, syntax.clone()) {
        let (token, _) = token?;
        tokens += 1;
        match token {
            Token::Mul | Token::Pow => repeats = true,
            Token::Str(_) | Token::String(_) | Token::BracketOpen => text = true,
            Token::Int(number) => product = product.saturating_mul(u128::from(number).max(1)),
            Token::Int128(number) => product = product.saturating_mul(*number),
            Token::VariableStart | Token::BlockStart => (repeats, text, product, tokens) = (false, false, 1, 0),
            Token::VariableEnd | Token::BlockEnd if repeats && text => {
                if product.saturating_mul(tokens) > 64 << 20 {
                    return Err(budget::refused("a constant of more than 16 MiB"));
                }
            }
            _ => {}
        }
        if tokens > MAX_EXPRESSION_TOKENS {
            return Err(budget::refused("an expression of more than 20000 parts"));
        }
    }
    Ok(())
}

/// Runs `work` with a stack that is deep enough for what recurses over templates and values.
fn with_deep_stack<T: Send>(work: impl FnOnce() -> Result<T, String> + Send) -> Result<T, String> {
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, work)
            .map_err(|error| format!("no thread for the template: {error}"))?
            .join()
            .unwrap_or_else(|_| Err("the template library panicked".to_string()))
    })
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
