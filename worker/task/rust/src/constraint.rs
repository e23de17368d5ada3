//! Constrained decoding on llguidance: which tokens may come next so that a text stays within a JSON schema, a regular
//! expression or a Lark grammar.

use crate::text_tokenizer::TextTokenizer;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{json, Value as Json};
use std::sync::Arc;

/// A grammar is the user's own text; these keep a hostile or careless one from taking the task's memory or time.
const MAX_SOURCE_BYTES: usize = 1 << 20;
const MAX_NESTING: usize = 100;
const MAX_VOCABULARY: usize = 1 << 22;
/// Compiling recurses over the grammar; the stack is only reserved, and used as deep as the grammar goes.
const COMPILE_STACK_BYTES: usize = 256 << 20;
/// Blanks between the parts of a JSON text end after this many: small models otherwise write them for ever.
const MAX_BLANKS: usize = 32;
/// Subschemas that are compiled alone to find the one that an error is about.
const MAX_BLAME_TRIALS: usize = 64;

fn limits() -> ParserLimits {
    ParserLimits {
        max_items_in_row: 2_000,
        initial_lexer_fuel: 1_000_000,
        step_lexer_fuel: 200_000,
        step_max_items: 50_000,
        max_lexer_states: 50_000, // up to 2 kB each
        max_grammar_size: 200_000,
        precompute_large_lexemes: true,
        verbose_errors: false,
    }
}

#[derive(Clone, Copy)]
pub enum Kind {
    JsonSchema,
    Regex,
    Lark,
}

pub struct ConstraintFactory {
    inner: ParserFactory,
}

pub struct Constraint {
    matcher: Matcher,
    vocab_size: usize,
}

impl ConstraintFactory {
    /// `vocab_size`: tokens that a mask covers, at least those of the tokenizer; ids without a token are never allowed.
    pub fn new(tokenizer: &TextTokenizer, end_ids: &[u32], vocab_size: usize) -> Result<Self, String> {
        let mut words = tokenizer.token_bytes()?;
        let vocab_size = vocab_size.max(words.len());
        if vocab_size > MAX_VOCABULARY {
            return Err(format!("a vocabulary of {vocab_size} tokens (at most {MAX_VOCABULARY})"));
        }
        words.resize(vocab_size, Vec::new());
        let Some(&first) = end_ids.first() else {
            return Err("no token ends a text, so a constrained one could not end".to_string());
        };
        if let Some(id) = end_ids.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(format!("the end token {id} is not one of the {vocab_size} tokens"));
        }
        let info = TokRxInfo::new(vocab_size as u32, first);
        let trie = TokTrie::from(&info, &words).with_eos_tokens(end_ids);
        // Approximate: every way to cut an allowed text into tokens is allowed; the model picks, none is forced on it.
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = SlicedBiasComputer::json_slices();
        let mut inner = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices)
            .map_err(|error| one_line(&error.to_string()))?;
        inner.quiet();
        *inner.limits_mut() = limits();
        Ok(Self { inner })
    }

    pub fn vocab_size(&self) -> usize {
        self.inner.tok_env().tok_trie().vocab_size()
    }

    pub fn constraint(&self, kind: Kind, source: &str) -> Result<Constraint, String> {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(format!("{} bytes long (at most {MAX_SOURCE_BYTES})", source.len()));
        }
        std::thread::scope(|scope| {
            std::thread::Builder::new()
                .stack_size(COMPILE_STACK_BYTES)
                .spawn_scoped(scope, || self.compile(kind, source))
                .map_err(|error| format!("no thread to compile it: {error}"))?
                .join()
                .unwrap_or_else(|_| Err("the grammar library panicked".to_string()))
        })
    }

    fn compile(&self, kind: Kind, source: &str) -> Result<Constraint, String> {
        let grammar = match kind {
            Kind::JsonSchema => {
                let schema: Json = serde_json::from_str(source).map_err(|error| format!("not JSON: {error}"))?;
                return self.compile_schema(&schema);
            }
            Kind::Regex => {
                regex_syntax_check(source)?;
                TopLevelGrammar::from_regex(source)
            }
            Kind::Lark => {
                check_nesting(source)?;
                TopLevelGrammar::from_lark(source.to_string())
            }
        };
        self.matcher(grammar)
    }

    fn compile_schema(&self, schema: &Json) -> Result<Constraint, String> {
        self.try_schema(schema).map_err(|message| {
            let mut trials = 0;
            let (place, message) = self.blame(schema, schema, String::new(), message, &mut trials);
            format!("at {}: {message}", if place.is_empty() { "its top" } else { &place })
        })
    }

    fn try_schema(&self, schema: &Json) -> Result<Constraint, String> {
        if !schema.is_object() && !schema.is_boolean() {
            return Err("a schema is an object or a boolean".to_string());
        }
        let mut schema = schema.clone();
        if let Some(object) = schema.as_object_mut() {
            let pattern = format!(r"[\x20\x0A\x0D\x09]{{1,{MAX_BLANKS}}}");
            object.entry("x-guidance").or_insert_with(|| json!({ "whitespace_pattern": pattern }));
        }
        self.matcher(TopLevelGrammar::from_json_schema(schema))
    }

    /// The innermost subschema that fails alone, as a JSON pointer, and what is said about it.
    fn blame(
        &self,
        root: &Json,
        schema: &Json,
        place: String,
        message: String,
        trials: &mut usize,
    ) -> (String, String) {
        for (step, child) in children(schema) {
            if *trials >= MAX_BLAME_TRIALS {
                break;
            }
            *trials += 1;
            let mut alone = child.clone();
            if let Some(object) = alone.as_object_mut() {
                for name in ["$defs", "definitions", "$schema", "x-guidance"] {
                    if let (Some(value), false) = (root.get(name), object.contains_key(name)) {
                        object.insert(name.to_string(), value.clone());
                    }
                }
            }
            if let Err(inner) = self.try_schema(&alone) {
                return self.blame(root, child, place + &step, inner, trials);
            }
        }
        (place, message)
    }

    fn matcher(&self, grammar: TopLevelGrammar) -> Result<Constraint, String> {
        let parser = self.inner.create_parser(grammar).map_err(|error| one_line(&error.to_string()))?;
        let mut matcher = Matcher::new(Ok(parser));
        if let Some(message) = matcher.get_error() {
            return Err(one_line(&message));
        }
        let vocab_size = self.vocab_size();
        // What cannot be used should fail here and not at the first token.
        matcher.compute_mask_or_eos().map_err(|error| one_line(&error.to_string()))?;
        Ok(Constraint { matcher, vocab_size })
    }
}

impl Constraint {
    /// Sets the bits of the tokens that may come next: bit t % 32 of word t / 32.
    pub fn mask(&mut self, words: &mut [u32]) -> Result<(), String> {
        let mask = self.matcher.compute_mask_or_eos().map_err(|error| one_line(&error.to_string()))?;
        let bits = mask.as_slice();
        let used = self.vocab_size.div_ceil(32);
        if words.len() < used || bits.len() < used {
            return Err(format!("a mask of {} words for {} tokens", words.len(), self.vocab_size));
        }
        words.fill(0);
        words[..used].copy_from_slice(&bits[..used]);
        if self.vocab_size % 32 != 0 {
            words[used - 1] &= (1u32 << (self.vocab_size % 32)) - 1;
        }
        Ok(())
    }

    pub fn accept(&mut self, token: u32) -> Result<(), String> {
        if token as usize >= self.vocab_size {
            return Err(format!("the token {token} is not one of the {} tokens", self.vocab_size));
        }
        if self.finished() {
            let trie = self.matcher.tok_env().map_err(|error| one_line(&error.to_string()))?;
            let ends = trie.tok_trie().eos_tokens().contains(&token);
            return if ends { Ok(()) } else { Err("the text is complete, no token may follow".to_string()) };
        }
        match self.matcher.try_consume_tokens(&[token]) {
            Ok(1) => Ok(()),
            Ok(_) => {
                let environment = self.matcher.tok_env().map_err(|error| one_line(&error.to_string()))?;
                Err(format!("the token {} is not allowed here", environment.tok_trie().token_dbg(token)))
            }
            Err(error) => Err(one_line(&error.to_string())),
        }
    }

    pub fn finished(&self) -> bool {
        self.matcher.is_stopped()
    }

    pub fn can_stop(&mut self) -> bool {
        if self.matcher.is_stopped() {
            return !self.matcher.is_error();
        }
        self.matcher.is_accepting().unwrap_or(false)
    }
}

/// The direct subschemas of a schema with the JSON pointer to each.
fn children(schema: &Json) -> Vec<(String, &Json)> {
    let mut found = Vec::new();
    let Some(object) = schema.as_object() else { return found };
    for (name, value) in object {
        let step = escape(name);
        match (name.as_str(), value) {
            ("properties" | "patternProperties" | "$defs" | "definitions", Json::Object(map)) => {
                found.extend(map.iter().map(|(key, child)| (format!("/{step}/{}", escape(key)), child)));
            }
            ("prefixItems" | "items" | "anyOf" | "oneOf" | "allOf", Json::Array(list)) => {
                found.extend(list.iter().enumerate().map(|(i, child)| (format!("/{step}/{i}"), child)));
            }
            ("items" | "additionalItems" | "additionalProperties" | "not", Json::Object(_)) => {
                found.push((format!("/{step}"), value));
            }
            _ => {}
        }
    }
    found
}

fn escape(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}

/// A bound on brackets within brackets: parsing them recurses.
fn check_nesting(source: &str) -> Result<(), String> {
    let mut depth = 0usize;
    for (index, byte) in source.bytes().enumerate() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > MAX_NESTING {
            let line = source.as_bytes()[..index].iter().filter(|&&b| b == b'\n').count() + 1;
            return Err(format!("line {line}: more than {MAX_NESTING} brackets within each other"));
        }
    }
    Ok(())
}

fn regex_syntax_check(source: &str) -> Result<(), String> {
    check_nesting(source)?;
    if source.is_empty() {
        return Err("the regular expression is empty".to_string());
    }
    Ok(())
}

/// The library's messages may span lines and carry its own notes; one line is enough to act on.
fn one_line(message: &str) -> String {
    let mut text = message.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ");
    if text.len() > 500 {
        let mut end = 500;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push_str("...");
    }
    text
}
