//! Words that name things: `vnic vm1`, or `vnic/vm1` in one word.

use clap::builder::{PossibleValue, TypedValueParser};
use clap::{Args as ClapArgs, error::ErrorKind};

use super::client::CliError;
use crate::resource::{Key, Kind};

/// A word that is a kind, or `KIND/NAME`. Completion offers the kinds; what the word means is seen to by [`targets`] and
/// [`one`], which know the words after it.
#[derive(Clone, Debug)]
pub(super) struct KindWord(pub(super) &'static [&'static str]);

impl TypedValueParser for KindWord {
    type Value = String;

    fn parse_ref(
        &self,
        command: &clap::Command,
        _: Option<&clap::Arg>,
        value: &std::ffi::OsStr,
    ) -> Result<String, clap::Error> {
        value
            .to_str()
            .map(str::to_owned)
            .ok_or_else(|| clap::Error::new(ErrorKind::InvalidUtf8).with_cmd(command))
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(self.0.iter().map(|kind| PossibleValue::new(*kind))))
    }
}

/// Exactly one vNIC.
#[derive(Debug, ClapArgs)]
pub(super) struct VnicArgs {
    /// `vnic`, or the whole as vnic/NAME.
    #[arg(value_parser = KindWord(&["vnic"]))]
    kind: String,
    /// Its name.
    name: Option<String>,
}

impl VnicArgs {
    /// Its name.
    pub(super) fn name(&self) -> Result<String, CliError> {
        vnic(&self.kind, self.name.as_deref())
    }
}

fn usage(text: impl std::fmt::Display) -> CliError {
    CliError::Usage(text.to_string())
}

/// Kind and name of one thing.
pub(super) fn one<'a>(
    kind: &'a str,
    name: Option<&'a str>,
    wanted: &str,
) -> Result<(&'a str, &'a str), CliError> {
    let pair = match name {
        Some(name) => Some((kind, name)),
        None => kind.split_once('/'),
    };
    pair.filter(|(kind, name)| !kind.is_empty() && !name.is_empty() && !kind.contains('/'))
        .ok_or_else(|| usage(format!("give {wanted} NAME, or {wanted}/NAME")))
}

/// Name of one vNIC.
pub(super) fn vnic(kind: &str, name: Option<&str>) -> Result<String, CliError> {
    let (kind, name) = one(kind, name, "vnic")?;
    match kind.parse() {
        Ok(Kind::Vnic) => Ok(name.to_owned()),
        Ok(_) | Err(_) => {
            Err(usage(format!("`{kind}` has no path of its own: give vnic NAME, or vnic/NAME")))
        }
    }
}

/// What `get` and `delete` are about.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Targets {
    /// Everything of one kind, or of all.
    All(Option<Kind>),
    /// These, in the order given, each once.
    Some(Vec<Key>),
}

/// Reads `KIND`, `KIND NAME…` or `KIND/NAME…`; `all` is every kind.
pub(super) fn targets(first: &str, others: &[String]) -> Result<Targets, CliError> {
    let mut keys: Vec<Key> = Vec::new();
    let mut push = |key: Key| {
        if !keys.contains(&key) {
            keys.push(key);
        }
    };
    if first.contains('/') {
        for word in std::iter::once(first).chain(others.iter().map(String::as_str)) {
            let (kind, name) = one(word, None, "KIND").map_err(|_| {
                usage(format!("`{word}` is not KIND/NAME, such as vnic/vm1, as the other words are"))
            })?;
            push(Key::new(kind.parse().map_err(usage)?, name));
        }
        return Ok(Targets::Some(keys));
    }
    if first == "all" {
        return match others.first() {
            None => Ok(Targets::All(None)),
            Some(name) => Err(usage(format!("of which kind is `{name}`? Give KIND {name}, or KIND/{name}"))),
        };
    }
    let kind = first.parse().map_err(usage)?;
    if others.is_empty() {
        return Ok(Targets::All(Some(kind)));
    }
    for name in others {
        if name.contains('/') {
            return Err(usage(format!(
                "`{name}` is not the name of a {first}: give names only, or KIND/NAME only"
            )));
        }
        push(Key::new(kind, name));
    }
    Ok(Targets::Some(keys))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(words: &[&str]) -> Result<Targets, String> {
        let others: Vec<String> = words[1..].iter().map(|word| (*word).to_owned()).collect();
        targets(words[0], &others).map_err(|error| {
            assert_eq!(error.exit_code(), 2);
            error.to_string()
        })
    }

    #[test]
    fn one_word_or_two_name_the_same() {
        let key = |kind, name: &str| Key::new(kind, name);
        let both = Targets::Some(vec![key(Kind::Vnic, "a"), key(Kind::Vnic, "b")]);
        assert_eq!(read(&["vnic", "a", "b"]).as_ref(), Ok(&both));
        assert_eq!(read(&["vnics/a", "vnic/b", "vnic/a"]).as_ref(), Ok(&both), "each once");
        let mixed = Targets::Some(vec![key(Kind::Switch, "a"), key(Kind::AclGroup, "a")]);
        assert_eq!(read(&["switch/a", "acl-group/a"]).as_ref(), Ok(&mixed));
        assert_eq!(read(&["all"]), Ok(Targets::All(None)));
        assert_eq!(read(&["groups"]), Ok(Targets::All(Some(Kind::AclGroup))));
        for (words, name) in [(&["vnic", "vm1"][..], "vm1"), (&["vnics/vm1"], "vm1")] {
            assert_eq!(vnic(words[0], words.get(1).copied()).ok().as_deref(), Some(name));
        }
    }

    #[test]
    fn words_that_name_nothing_say_what_to_give() {
        let said = |words: &[&str]| read(words).expect_err("names nothing");
        assert!(said(&["router"]).contains("use switch, aclGroup or vnic"));
        assert!(said(&["all", "vm1"]).contains("KIND/vm1"));
        assert!(said(&["vnic/a", "b"]).contains("`b` is not KIND/NAME"));
        assert!(said(&["vnic/"]).contains("`vnic/` is not KIND/NAME"));
        assert!(said(&["vnic", "vnic/a"]).contains("`vnic/a` is not the name of a vnic"));
        for (kind, name) in [("vnic", None), ("vnic/", None), ("switch", Some("blue")), ("vnic/a", Some("b"))]
        {
            let error = vnic(kind, name).expect_err("no vNIC");
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains("give vnic NAME"), "{error}");
        }
    }
}
