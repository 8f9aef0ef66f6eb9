//! Pages of lists (AIP-158): how many items, from where on, and the opaque token between two pages.
//!
//! A token says only where to go on; it carries no authority, because every call is authorised anew. It is bound to the
//! list that it came from and tampering is noticed. This file must not know what is listed.

use sha2::{Digest, Sha256};

/// Bytes of a token's check.
const TAG: usize = 12;
/// Longest token that is looked at.
const MAX_TOKEN_LENGTH: usize = 2048;

/// Which page is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageRequest {
    /// Items at most, at least 1.
    pub size: usize,
    /// Key of the last item of the page before; `None` is the first page.
    pub after: Option<String>,
}

/// One page.
#[derive(Debug, Clone)]
pub struct Page<T> {
    /// The items.
    pub items: Vec<T>,
    /// Key of the last item when there are more; turned into a token by [`next_token`].
    pub next: Option<String>,
}

/// Why a page cannot be given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    /// `page_size` below zero.
    #[error("page_size is {given}, it must not be negative")]
    NegativeSize {
        /// What was asked for.
        given: i32,
    },
    /// The token is not one of ours, or from another list.
    #[error("page_token is not a token of this list: begin again without one")]
    BadToken,
}

impl PageRequest {
    /// Reads the two fields of a list request. `scope` names method and parent: a token works only where it came from.
    pub fn parse(
        scope: &str,
        page_size: i32,
        page_token: &str,
        default: usize,
        max: usize,
    ) -> Result<Self, PageError> {
        let size = match usize::try_from(page_size) {
            Err(_) => return Err(PageError::NegativeSize { given: page_size }),
            Ok(0) => default.min(max),
            Ok(size) => size.min(max),
        };
        let after = if page_token.is_empty() {
            None
        } else {
            Some(open_token(scope, page_token).ok_or(PageError::BadToken)?)
        };
        Ok(Self { size, after })
    }
}

impl<T> Page<T> {
    /// Cuts a result that was read with one item more than asked for.
    pub fn cut(mut items: Vec<T>, request: &PageRequest, key: impl Fn(&T) -> String) -> Self {
        let more = items.len() > request.size;
        items.truncate(request.size);
        let next = if more { items.last().map(key) } else { None };
        Self { items, next }
    }

    /// The same page with its items changed.
    pub fn map<U>(self, change: impl FnMut(T) -> U) -> Page<U> {
        Page {
            items: self.items.into_iter().map(change).collect(),
            next: self.next,
        }
    }
}

/// The token for the page after `page`; empty on the last one.
pub fn next_token(scope: &str, next: Option<&str>) -> String {
    let Some(after) = next else {
        return String::new();
    };
    let tag = tag(scope, after);
    let mut bytes = tag.to_vec();
    bytes.extend(masked(&tag, after.as_bytes()));
    hex::encode(bytes)
}

fn open_token(scope: &str, token: &str) -> Option<String> {
    if token.len() > MAX_TOKEN_LENGTH {
        return None;
    }
    let bytes = hex::decode(token).ok()?;
    let (given, body) = bytes.split_at_checked(TAG)?;
    let given: [u8; TAG] = given.try_into().ok()?;
    let after = String::from_utf8(masked(&given, body)).ok()?;
    (tag(scope, &after) == given).then_some(after)
}

fn tag(scope: &str, after: &str) -> [u8; TAG] {
    let mut hash = Sha256::new();
    hash.update(b"espalier-page-v1\0");
    hash.update(scope.as_bytes());
    hash.update([0]);
    hash.update(after.as_bytes());
    let mut tag = [0; TAG];
    tag.copy_from_slice(&hash.finalize()[..TAG]);
    tag
}

/// Keeps clients from building on what is inside; it hides nothing that the list does not show.
fn masked(tag: &[u8; TAG], body: &[u8]) -> Vec<u8> {
    let stream = (0u32..).flat_map(|block| {
        let mut hash = Sha256::new();
        hash.update(tag);
        hash.update(block.to_le_bytes());
        hash.finalize()
    });
    body.iter().zip(stream).map(|(a, b)| a ^ b).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
    use super::*;

    #[test]
    fn sizes_are_coerced_and_negative_ones_refused() {
        let size = |n| PageRequest::parse("s", n, "", 50, 1000).map(|p| p.size);
        assert_eq!(size(0), Ok(50));
        assert_eq!(size(1000), Ok(1000));
        assert_eq!(size(1001), Ok(1000));
        assert_eq!(size(i32::MAX), Ok(1000));
        assert_eq!(size(-1), Err(PageError::NegativeSize { given: -1 }));
    }

    #[test]
    fn tokens_go_round_and_stay_in_their_list() {
        let token = next_token("ListAdapters tenants/acme", Some("tickets"));
        let open = |scope, token: &str| PageRequest::parse(scope, 0, token, 50, 1000);
        let page = open("ListAdapters tenants/acme", &token).unwrap();
        assert_eq!(page.after.as_deref(), Some("tickets"));
        assert_eq!(
            open("ListAdapters tenants/globex", &token),
            Err(PageError::BadToken)
        );
        for at in 0..token.len() {
            let mut bad = token.clone().into_bytes();
            bad[at] = if bad[at] == b'0' { b'1' } else { b'0' };
            let bad = String::from_utf8(bad).unwrap();
            assert!(
                open("ListAdapters tenants/acme", &bad).is_err(),
                "byte {at}"
            );
        }
        for bad in ["x", "00", "é", &"0".repeat(5000)] {
            assert_eq!(open("s", bad), Err(PageError::BadToken));
        }
        assert_eq!(next_token("s", None), "");
    }

    #[test]
    fn a_full_page_is_the_last_one_when_nothing_follows() {
        let request = PageRequest {
            size: 2,
            after: None,
        };
        let page = Page::cut(vec!["a", "b"], &request, ToString::to_string);
        assert_eq!(page.next, None);
        let page = Page::cut(vec!["a", "b", "c"], &request, ToString::to_string);
        assert_eq!((page.items.len(), page.next.as_deref()), (2, Some("b")));
    }
}
