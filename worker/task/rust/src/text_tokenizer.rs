//! A thin layer over `tokenizers::Tokenizer` with the defaults of transformers' fast tokenizers.

use serde_json::{json, Value as Json};
use std::collections::HashMap;
use tokenizers::processors::template::{Template, TemplateProcessing};
use tokenizers::{DecoderWrapper, Tokenizer};

pub struct TextTokenizer {
    inner: Tokenizer,
}

impl TextTokenizer {
    pub fn from_json(json: &str) -> Result<Self, String> {
        check_claims(json)?;
        let mut inner: Tokenizer = json.parse().map_err(|error| match faulty_field(json) {
            Some(field) => format!("not a tokenizer.json: the field {field:?} is not understood: {error}"),
            None => format!("not a tokenizer.json: {error}"),
        })?;
        inner.with_truncation(None).map_err(|error| error.to_string())?;
        inner.with_padding(None);
        Ok(Self { inner })
    }

    pub fn set_bos_eos(&mut self, bos: &str, eos: &str) -> Result<(), String> {
        let mut pieces = vec!["$A:0".to_string()];
        let mut special = Vec::new();
        for (token, first) in [(bos, true), (eos, false)] {
            if token.is_empty() {
                continue;
            }
            let id = self.token_to_id(token).ok_or_else(|| format!("the token {token:?} is not in the vocabulary"))?;
            pieces.insert(if first { 0 } else { pieces.len() }, format!("{token}:0"));
            special.push((token.to_string(), id));
        }
        let template = Template::try_from(pieces).map_err(|error| format!("special token template: {error}"))?;
        let processor = TemplateProcessing::builder()
            .single(template)
            .special_tokens(special)
            .build()
            .map_err(|error| format!("special token template: {error}"))?;
        self.inner.with_post_processor(Some(processor));
        Ok(())
    }

    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, String> {
        let encoding = self.inner.encode_fast(text, add_special_tokens).map_err(|error| error.to_string())?;
        Ok(encoding.get_ids().to_vec())
    }

    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, String> {
        self.inner.decode(ids, skip_special_tokens).map_err(|error| error.to_string())
    }

    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The bytes that each token stands for within a text. Empty: an id without a token. Special tokens start with 0xFF,
    /// which no text contains.
    pub fn token_bytes(&self) -> Result<Vec<Vec<u8>>, String> {
        let style = ByteStyle::of(self.inner.get_decoder())?;
        let vocabulary = self.inner.get_vocab(true);
        let size = vocabulary.values().max().map_or(0, |&id| id as usize + 1);
        if size > MAX_TOKEN_IDS {
            return Err(format!("the greatest token id is {}", size - 1));
        }
        let mut words = vec![Vec::new(); size];
        for (token, id) in vocabulary {
            words[id as usize] = style.bytes_of(&token);
        }
        for (id, token) in self.inner.get_added_tokens_decoder() {
            let mut bytes = token.content.into_bytes();
            if token.special {
                bytes.insert(0, 0xff);
            }
            if let Some(word) = words.get_mut(id as usize) {
                *word = bytes;
            }
        }
        // Longer than any word of a language: a token that no constraint needs.
        words.iter_mut().filter(|word| word.len() > MAX_TOKEN_BYTES).for_each(|word| word.clear());
        Ok(words)
    }
}

const CHARSMAP: &str = "precompiled_charsmap";
/// How much longer the replacements of a tokenizer may make a text, all together; real ones turn a space into three bytes.
const MAX_GROWTH: usize = 4096;

/// Refuses what would take gigabytes: a charsmap that claims more than it holds, replacements that multiply one another.
fn check_claims(json: &str) -> Result<(), String> {
    if !json.contains(CHARSMAP) && !json.contains("\"Replace\"") {
        return Ok(());
    }
    let Ok(root) = serde_json::from_str::<serde_json::Value>(json) else { return Ok(()) }; // its reader says why
    let mut left: Vec<_> = ["normalizer", "decoder"].iter().filter_map(|part| root.get(part)).collect();
    let mut growth = 1usize;
    while let Some(value) = left.pop() {
        if let Some(map) = value.get(CHARSMAP).and_then(|map| map.as_str()) {
            let size = trie_bytes(map);
            if size > map.len() / 4 * 3 {
                return Err(format!(
                    "not a tokenizer.json: a {CHARSMAP} claims a trie of {size} bytes, more than it holds"
                ));
            }
        }
        if let (Some(pattern), Some(content)) =
            (value.get("pattern"), value.get("content").and_then(|text| text.as_str()))
        {
            let replaced = pattern.get("String").and_then(|text| text.as_str()).map_or(1, |text| text.len().max(1));
            growth = growth.saturating_mul(content.len().div_ceil(replaced).max(1));
        }
        match value {
            serde_json::Value::Array(items) => left.extend(items),
            serde_json::Value::Object(fields) => left.extend(fields.values()),
            _ => {}
        }
    }
    if growth > MAX_GROWTH {
        return Err(format!("not a tokenizer.json: its replacements make a text up to {growth} times as long"));
    }
    Ok(())
}

/// What a SentencePiece charsmap (base64) begins with: the size of its trie, for which its reader makes room at once.
fn trie_bytes(map: &str) -> usize {
    const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bits = map.bytes().take(6).enumerate().fold(0u64, |bits, (i, letter)| {
        let place = LETTERS.iter().position(|&other| other == letter).unwrap_or(0);
        bits | (place as u64) << (42 - 6 * i)
    });
    u32::from_le_bytes([40, 32, 24, 16].map(|shift| (bits >> shift) as u8)) as usize
}

/// The field that makes a tokenizer.json unreadable: the first that is not read where all others are plain.
fn faulty_field(json: &str) -> Option<&'static str> {
    let whole: Json = serde_json::from_str(json).ok()?;
    let plain = json!({"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}});
    let fields = ["model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding"];
    fields.into_iter().find(|&field| {
        let mut alone = plain.clone();
        alone[field] = whole.get(field).cloned().unwrap_or(Json::Null);
        std::panic::catch_unwind(|| alone.to_string().parse::<Tokenizer>().is_err()).unwrap_or(true)
    })
}

const MAX_TOKEN_IDS: usize = 1 << 22;
const MAX_TOKEN_BYTES: usize = 255;

/// How a tokenizer's decoder turns the text of a token into bytes.
enum ByteStyle {
    ByteLevel(HashMap<char, u8>),
    Spaced { space: String, byte_fallback: bool },
}

impl ByteStyle {
    fn of(decoder: Option<&DecoderWrapper>) -> Result<Self, String> {
        let mut parts = Vec::new();
        flatten(decoder, &mut parts);
        let mut space = None;
        let mut byte_fallback = false;
        for part in parts {
            match part {
                DecoderWrapper::ByteLevel(_) => return Ok(Self::ByteLevel(byte_level_map())),
                DecoderWrapper::ByteFallback(_) => byte_fallback = true,
                DecoderWrapper::Metaspace(m) => space = Some(m.get_replacement().to_string()),
                DecoderWrapper::Replace(r) => {
                    let value = serde_json::to_value(r).map_err(|error| error.to_string())?;
                    if let (Some(pattern), Some(" ")) = (value["pattern"]["String"].as_str(), value["content"].as_str())
                    {
                        space = Some(pattern.to_string());
                    }
                }
                _ => {}
            }
        }
        match (space, byte_fallback) {
            (None, false) => {
                Err("the decoder is neither byte-level nor SentencePiece-like, so the bytes of its tokens \
                                  are not known"
                    .to_string())
            }
            (space, byte_fallback) => Ok(Self::Spaced { space: space.unwrap_or(" ".to_string()), byte_fallback }),
        }
    }

    fn bytes_of(&self, token: &str) -> Vec<u8> {
        match self {
            // As the decoder does: a token with a letter outside the alphabet stands for its own text.
            Self::ByteLevel(map) => token
                .chars()
                .map(|letter| map.get(&letter).copied())
                .collect::<Option<Vec<u8>>>()
                .unwrap_or_else(|| token.as_bytes().to_vec()),
            Self::Spaced { space, byte_fallback } => {
                let hex = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
                match hex.filter(|hex| *byte_fallback && hex.len() == 2).map(|hex| u8::from_str_radix(hex, 16)) {
                    Some(Ok(byte)) => vec![byte],
                    _ => token.replace(space.as_str(), " ").into_bytes(),
                }
            }
        }
    }
}

fn flatten<'a>(decoder: Option<&'a DecoderWrapper>, parts: &mut Vec<&'a DecoderWrapper>) {
    match decoder {
        Some(DecoderWrapper::Sequence(sequence)) => {
            sequence.get_decoders().iter().for_each(|part| flatten(Some(part), parts));
        }
        Some(part) => parts.push(part),
        None => {}
    }
}

/// GPT-2's alphabet: bytes that print stand for themselves, the others for letters from U+0100 on, in order.
fn byte_level_map() -> HashMap<char, u8> {
    let prints = |byte: u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut next = 0x100;
    let mut map = HashMap::new();
    for byte in 0..=255u8 {
        let letter = if prints(byte) {
            u32::from(byte)
        } else {
            next += 1;
            next - 1
        };
        map.insert(char::from_u32(letter).unwrap_or('\u{fffd}'), byte);
    }
    map
}
