//! A thin layer over `tokenizers::Tokenizer` with the defaults of transformers' fast tokenizers.

use tokenizers::processors::template::{Template, TemplateProcessing};
use tokenizers::Tokenizer;

pub struct TextTokenizer {
    inner: Tokenizer,
}

impl TextTokenizer {
    pub fn from_json(json: &str) -> Result<Self, String> {
        let mut inner: Tokenizer = json.parse().map_err(|error| format!("not a tokenizer.json: {error}"))?;
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
}
