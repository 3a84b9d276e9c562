//! What a request's input is made of, for the bound on its tokens: a chain of keyed hashes over its parts (tools
//! and system prompt, then block by block), and how many tokens each part can have at the most. Pure.
//!
//! Why a chain is enough: the provider's tokens for a beginning of a conversation do not change by what follows
//! it, so what a beginning was billed for bounds it in every later request.
//!
//! Why bytes bound what is new, and what that takes for granted: the provider's tokenizer is not known. Those that are
//! known fall back to bytes, so that a token has at least one byte of what the tokenizer is given. That may be more
//! than stands in the request: `expand` allows for letters taken apart, JSON written anew and the words around a
//! parameter; constants here for the words around messages, tools and the provider's own prompt; multiples for
//! images, documents and citations, whose bytes say nothing. Of these the sizes of media are the provider's own limits;
//! the others are what it documents or was seen, rounded up, and no promise of its. What it fetches by itself (pages of
//! a search, tools of MCP servers) no bound on a request covers. What is above a bound is charged all the same: then
//! a budget is passed by so much, once, and what was billed is what the next bound is made of.
//!
//! Why a fast hash is enough: two beginnings with one hash would make a bound too low, no more. Its two keys are
//! random and of this process, and no hash leaves it, so that a cell can neither compute nor compare any; by
//! chance two of the 2^13 beginnings known and 2^9 asked for meet in one of 2^42 requests.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher};
use std::sync::LazyLock;

use foldhash::SharedSeed;
use foldhash::quality::{FoldHasher, SeedableRandomState};

use super::expand;

/// Tokens that the provider adds for tools and the like (its prompts for the use of tools, of a computer, and of a
/// format for the answer: up to about 900 in all).
const BASE_TOKENS: u64 = 1_024;
/// Tokens of the definition of a tool that is the provider's own (bash, text editor, computer: 245 to 735; it does
/// not say how many those have that it runs itself).
const TYPED_TOOL_TOKENS: u64 = 4_096;
/// Tokens that lie between a known beginning and what follows it.
const JOINT_TOKENS: u64 = 64;
/// Tokens around a message.
const MESSAGE_TOKENS: u64 = 16;
/// Most that one image costs, in tokens; its base64 text is not what is billed.
const IMAGE_TOKENS_MAX: u64 = 5_000;
/// Most that one document costs, in tokens: the largest context that a model has; a request with more is refused. A
/// PDF's bytes are compressed and bound nothing.
const DOCUMENT_TOKENS_MAX: u64 = 1_000_000;
/// A text that is to be cited is cut into its sentences, each with marks around it: so many tokens for a byte.
const CITED_TOKENS_PER_BYTE: u64 = 8;
/// System blocks with fewer bytes are counted, but are no part of the chain: the CLI's first one differs from
/// conversation to conversation.
const SYSTEM_BYTES_MIN: u64 = 256;

/// Links of a conversation's beginning that are remembered for all: one request must not drive out what others know.
const OPENING_LINKS_MAX: usize = 16;
/// Places of what the head holds besides the model; see [`ShapeBuilder::setting`].
const HEAD_PLACES: usize = 8;

static SHARED: LazyLock<SharedSeed> = LazyLock::new(|| SharedSeed::from_u64(random()));
static KEYS: LazyLock<SeedableRandomState> =
    LazyLock::new(|| SeedableRandomState::with_seed(random(), &SHARED));

/// A hash that nobody outside can compute.
pub(super) fn keyed(text: &str) -> u64 {
    KEYS.hash_one(text)
}

/// From the system; where that fails, from std, which has its own way to it.
fn random() -> u64 {
    getrandom::u64().unwrap_or_else(|_| std::hash::RandomState::new().hash_one(0))
}

/// Bounds that are known, by hash. Bounded itself: when full, the older half goes.
#[derive(Debug)]
pub struct Known {
    young: HashMap<u64, u64>,
    old: HashMap<u64, u64>,
    half: usize,
}

impl Known {
    /// Keeps at most `entries_max`.
    pub fn new(entries_max: usize) -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), half: (entries_max / 2).max(1) }
    }

    fn get(&self, key: u64) -> Option<u64> {
        self.young.get(&key).or_else(|| self.old.get(&key)).copied()
    }

    fn put(&mut self, key: u64, tokens: u64) {
        let tokens = self.get(key).map_or(tokens, |known| known.min(tokens));
        if self.young.len() >= self.half && !self.young.contains_key(&key) {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, tokens);
    }
}

/// A bound on a request's input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bound {
    /// Tokens at the most.
    pub tokens: u64,
    /// How many of them are only bytes that nobody has counted.
    pub guessed: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Link {
    chain: u64,
    tokens_max: u64,
}

/// The parts of a request's input.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Shape {
    /// Tools and system prompt, then each block.
    links: Vec<Link>,
    /// How many of them begin conversations of others, too: up to the end of a user's first message.
    opening: usize,
    /// What is in no link.
    loose: u64,
}

impl Shape {
    /// The best bound that follows from what is known.
    pub fn bound(&self, known: &[&Known]) -> Bound {
        let mut after = self.loose;
        let mut best: Option<Bound> = None;
        for link in self.links.iter().rev() {
            if let Some(tokens) = known.iter().filter_map(|known| known.get(link.chain)).min() {
                let tokens = tokens.saturating_add(after).saturating_add(JOINT_TOKENS);
                if best.is_none_or(|best| tokens < best.tokens) {
                    best = Some(Bound { tokens, guessed: after });
                }
            }
            after = after.saturating_add(link.tokens_max);
        }
        let all = Bound { tokens: after.saturating_add(BASE_TOKENS), guessed: after };
        best.filter(|best| best.tokens <= all.tokens).unwrap_or(all)
    }

    /// What a count of it tells others of: the head (tools, system prompt, model) where the rest has at most
    /// `rest_max` tokens, so that it is the head that is counted; else this very request.
    pub fn counted_with(&self, rest_max: u64) -> Option<u64> {
        let (head, rest) = self.links.split_first()?;
        let rest_tokens = rest.iter().fold(self.loose, |sum, link| sum.saturating_add(link.tokens_max));
        Some(if rest_tokens <= rest_max { head.chain } else { rest.last().unwrap_or(head).chain })
    }

    /// Whether the conversation has only begun.
    pub fn is_opening(&self) -> bool {
        self.opening == self.links.len()
    }

    /// Remembers that this whole request has at most `tokens`.
    pub fn learn(&self, tokens: u64, known: &mut Known) {
        if let Some(link) = self.links.last() {
            known.put(link.chain, tokens);
        }
    }

    /// The same for every beginning of it that other conversations may share: a part has no more than the whole.
    pub fn learn_opening(&self, tokens: u64, known: &mut Known) {
        for link in self.links.iter().take(self.opening.min(OPENING_LINKS_MAX)) {
            known.put(link.chain, tokens);
        }
    }
}

/// Builds a [`Shape`] while a body is read.
#[derive(Debug, Clone)]
pub(super) struct ShapeBuilder {
    head: Vec<u64>,
    head_tokens: u64,
    links: Vec<Link>,
    chain: u64,
    loose: u64,
    messages: usize,
    opening: usize,
}

impl Default for ShapeBuilder {
    fn default() -> Self {
        Self {
            // Places for each thing that the head holds, whatever their order in the body.
            head: vec![0; HEAD_PLACES],
            head_tokens: 0,
            links: Vec::new(),
            chain: 0,
            loose: 0,
            messages: 0,
            opening: 0,
        }
    }
}

/// A piece of the input that is being read.
pub(super) struct Piece {
    hasher: FoldHasher<'static>,
    bytes: u64,
}

impl Piece {
    pub(super) fn new() -> Self {
        Self { hasher: KEYS.build_hasher(), bytes: 0 }
    }

    pub(super) fn add(&mut self, text: &str) {
        self.take(text, expand::of_text(text));
    }

    /// A JSON value that is written anew.
    pub(super) fn add_json(&mut self, raw: &str) {
        self.take(raw, expand::of_json(raw));
    }

    /// The input of a tool's call.
    pub(super) fn add_call(&mut self, raw: &str, parameters: u64) {
        self.take(raw, expand::of_call(raw, parameters));
    }

    fn take(&mut self, text: &str, more: u64) {
        self.hasher.write_usize(text.len());
        self.hasher.write(text.as_bytes());
        self.count(text.len());
        self.bytes = self.bytes.saturating_add(more);
    }

    /// Bytes that count and are the same in every piece of this kind.
    pub(super) fn count(&mut self, bytes: usize) {
        self.bytes = self.bytes.saturating_add(bytes as u64);
    }
}

/// How many blocks of a kind were seen, and the bytes of their data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Media {
    pub(super) images: u64,
    pub(super) documents: u64,
    pub(super) bytes: u64,
    /// Bytes of texts that are to be cited; they count as text besides.
    pub(super) cited: u64,
}

impl Media {
    fn tokens(self) -> u64 {
        let images = self.images.saturating_mul(IMAGE_TOKENS_MAX);
        let documents = self.documents.saturating_mul(DOCUMENT_TOKENS_MAX);
        let marks = self.cited.saturating_mul(CITED_TOKENS_PER_BYTE - 1);
        images.saturating_add(documents).saturating_add(marks)
    }
}

fn mix(parts: &[u64]) -> u64 {
    let mut hasher = KEYS.build_hasher();
    parts.iter().for_each(|part| hasher.write_u64(*part));
    hasher.finish()
}

impl ShapeBuilder {
    /// A block of a message: text bytes and what its media cost.
    pub(super) fn block(&mut self, piece: Piece, media: Media) {
        self.chain = mix(&[self.chain, piece.hasher.finish()]);
        let text = piece.bytes.saturating_sub(media.bytes);
        self.links.push(Link { chain: self.chain, tokens_max: text.saturating_add(media.tokens()) });
    }

    /// The end of a message.
    pub(super) fn message(&mut self, role: &str) {
        let mut piece = Piece::new();
        piece.add(role);
        self.chain = mix(&[self.chain, piece.hasher.finish(), u64::MAX]);
        self.links.push(Link { chain: self.chain, tokens_max: MESSAGE_TOKENS + role.len() as u64 });
        self.messages += 1;
        if self.messages == 1 && role == "user" {
            self.opening = self.links.len();
        }
    }

    /// A block of the system prompt.
    pub(super) fn system(&mut self, piece: Piece, media: Media) {
        let tokens = piece.bytes.saturating_sub(media.bytes).saturating_add(media.tokens());
        if tokens < SYSTEM_BYTES_MIN {
            self.loose = self.loose.saturating_add(tokens + MESSAGE_TOKENS);
        } else {
            self.head[0] = mix(&[self.head[0], piece.hasher.finish()]);
            self.head_tokens = self.head_tokens.saturating_add(tokens);
        }
    }

    /// The tools. One whose definition is only loaded later is counted again, with all others: what loads it is
    /// short. Of tools with a type of the provider's only the name stands there: it adds the definition.
    pub(super) fn tools(&mut self, piece: Piece, deferred: bool, typed: u64) {
        self.head_tokens = self.head_tokens.saturating_add(typed.saturating_mul(TYPED_TOOL_TOKENS));
        if deferred {
            self.loose = self.loose.saturating_add(piece.bytes);
        }
        self.setting_piece(1, piece);
    }

    /// A part of the head that was read apart. Where it has a place of its own nothing else was put there before.
    pub(super) fn add(&mut self, part: &Self) {
        for (place, of_part) in self.head.iter_mut().zip(&part.head) {
            if *of_part != 0 {
                *place = *of_part;
            }
        }
        self.head_tokens = self.head_tokens.saturating_add(part.head_tokens);
        self.loose = self.loose.saturating_add(part.loose);
    }

    /// Another field that becomes input, or changes what is counted. `place` is its own.
    pub(super) fn setting(&mut self, place: usize, raw: &str) {
        let mut piece = Piece::new();
        piece.add(raw);
        self.setting_piece(place, piece);
    }

    fn setting_piece(&mut self, place: usize, piece: Piece) {
        self.head_tokens = self.head_tokens.saturating_add(piece.bytes);
        if let Some(slot) = self.head.get_mut(place) {
            *slot = piece.hasher.finish();
        }
    }

    pub(super) fn finish(mut self, model: &str, thinking: &str) -> Shape {
        let mut piece = Piece::new();
        piece.add(model);
        piece.add(thinking);
        self.head.push(piece.hasher.finish());
        let head = mix(&self.head);
        let mut links = Vec::with_capacity(self.links.len() + 1);
        links.push(Link { chain: head, tokens_max: self.head_tokens });
        links.extend(self.links.iter().map(|link| Link { chain: mix(&[head, link.chain]), ..*link }));
        Shape { links, opening: self.opening + 1, loose: self.loose }
    }
}
