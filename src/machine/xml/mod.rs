//! XML as libvirt wants it: a small tree, written and read through quick-xml.
//!
//! [`domain`] and [`network`] build trees from plain values; [`Node::parse`] reads what libvirt answers.
//! Everything that ends up in a document passes [`Node::render`], which escapes it and refuses the characters
//! that XML 1.0 cannot carry, so that no text from outside can change the document's shape.

pub mod devices;
pub mod domain;
pub mod kept;
pub mod network;
pub mod pci;

use quick_xml::events::{BytesEnd, BytesStart, BytesText, Event};
use quick_xml::{Reader, Writer, XmlVersion};

/// The namespace of our own elements in a domain's `<metadata>`.
pub const OWNER_NAMESPACE: &str = "urn:cannery:machine:1";

/// Deepest nesting that [`Node::parse`] follows. libvirt's documents stay under ten levels; a bound keeps a
/// damaged answer from exhausting the stack.
const MAX_DEPTH: usize = 64;

/// What can be wrong with a document.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A value holds a character that must not stand in a domain description.
    #[error("{place} holds the control character {}, which a machine description cannot carry", character.escape_unicode())]
    Control {
        /// Element and attribute that would have held it.
        place: String,
        /// The character.
        character: char,
    },
    /// libvirt's answer is not the XML that it should be.
    #[error("libvirt answered with XML that cannot be read: {0}")]
    Unreadable(String),
}

/// One element with its attributes, children and text, in document order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Node {
    /// The tag as written, prefix included.
    pub name: String,
    /// Attributes in order.
    pub attributes: Vec<(String, String)>,
    /// Child elements in order.
    pub children: Vec<Node>,
    /// The element's own text, trimmed; mixed content is not kept in place.
    pub text: String,
}

/// Starts an element.
pub fn node(name: &str) -> Node {
    Node {
        name: name.to_owned(),
        ..Node::default()
    }
}

impl Node {
    /// With this attribute added.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<String>) -> Node {
        self.attributes.push((name.to_owned(), value.into()));
        self
    }

    /// With this child added.
    #[must_use]
    pub fn child(mut self, child: Node) -> Node {
        self.children.push(child);
        self
    }

    /// With these children added.
    #[must_use]
    pub fn children(mut self, children: impl IntoIterator<Item = Node>) -> Node {
        self.children.extend(children);
        self
    }

    /// With this text.
    #[must_use]
    pub fn text(mut self, text: impl Into<String>) -> Node {
        self.text = text.into();
        self
    }

    /// The attribute's value.
    pub fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }

    /// The first child of that name.
    pub fn first(&self, name: &str) -> Option<&Node> {
        self.children.iter().find(|child| child.name == name)
    }

    /// The element at the end of a path of first children.
    pub fn at(&self, path: &[&str]) -> Option<&Node> {
        path.iter().try_fold(self, |here, name| here.first(name))
    }

    /// All children of that name.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Node> {
        self.children.iter().filter(move |child| child.name == name)
    }

    /// Writes the tree, indented by two, every value escaped.
    ///
    /// # Errors
    /// [`Error::Control`] where a value holds a control character (line breaks and tabs included: none of
    /// our values has a use for them) or one of XML's non-characters.
    pub fn render(&self) -> Result<String, Error> {
        let mut writer = Writer::new_with_indent(Vec::new(), b' ', 2);
        self.write(&mut writer)?;
        let mut text =
            String::from_utf8(writer.into_inner()).map_err(|error| Error::Unreadable(error.to_string()))?;
        text.push('\n');
        Ok(text)
    }

    fn write(&self, writer: &mut Writer<Vec<u8>>) -> Result<(), Error> {
        let broken = |error: std::io::Error| Error::Unreadable(error.to_string());
        let mut start = BytesStart::new(self.name.as_str());
        for (key, value) in &self.attributes {
            check(value, || format!("<{}>'s {key}", self.name))?;
            start.push_attribute((key.as_str(), value.as_str()));
        }
        if self.children.is_empty() && self.text.is_empty() {
            return writer.write_event(Event::Empty(start)).map_err(broken);
        }
        writer.write_event(Event::Start(start)).map_err(broken)?;
        if !self.text.is_empty() {
            check(&self.text, || format!("<{}>", self.name))?;
            writer
                .write_event(Event::Text(BytesText::new(&self.text)))
                .map_err(broken)?;
        }
        for child in &self.children {
            child.write(writer)?;
        }
        writer
            .write_event(Event::End(BytesEnd::new(self.name.as_str())))
            .map_err(broken)
    }

    /// Reads one document.
    ///
    /// # Errors
    /// [`Error::Unreadable`] where the text is not well-formed or nests deeper than any libvirt document.
    pub fn parse(text: &str) -> Result<Node, Error> {
        let bad = |why: &str| Error::Unreadable(why.to_owned());
        let mut reader = Reader::from_str(text);
        let mut open: Vec<Node> = Vec::new();
        loop {
            match reader
                .read_event()
                .map_err(|error| Error::Unreadable(error.to_string()))?
            {
                Event::Start(start) => {
                    if open.len() >= MAX_DEPTH {
                        return Err(bad("it nests too deep"));
                    }
                    open.push(begin(&start)?);
                }
                Event::Empty(start) => {
                    let done = begin(&start)?;
                    match open.last_mut() {
                        Some(parent) => parent.children.push(done),
                        None => return Ok(done),
                    }
                }
                Event::End(_) => {
                    let mut done = open.pop().ok_or_else(|| bad("an element ends twice"))?;
                    done.text = done.text.trim().to_owned();
                    match open.last_mut() {
                        Some(parent) => parent.children.push(done),
                        None => return Ok(done),
                    }
                }
                Event::Text(text) => {
                    if let Some(parent) = open.last_mut() {
                        parent.text.push_str(&text.xml10_content());
                    }
                }
                Event::CData(text) => {
                    if let Some(parent) = open.last_mut() {
                        parent.text.push_str(&text.xml10_content());
                    }
                }
                Event::GeneralRef(reference) => {
                    let raw = format!("&{};", reference.xml10_content());
                    let text = quick_xml::escape::unescape(&raw)
                        .map_err(|error| Error::Unreadable(error.to_string()))?;
                    if let Some(parent) = open.last_mut() {
                        parent.text.push_str(&text);
                    }
                }
                Event::Eof => return Err(bad("it ends too early")),
                Event::Comment(_) | Event::Decl(_) | Event::PI(_) | Event::DocType(_) => {}
            }
        }
    }
}

fn begin(start: &BytesStart<'_>) -> Result<Node, Error> {
    let mut element = node(start.name().as_ref());
    for attribute in start.attributes() {
        let attribute = attribute.map_err(|error| Error::Unreadable(error.to_string()))?;
        let value = attribute
            .normalized_value(XmlVersion::Explicit1_0)
            .map_err(|error| Error::Unreadable(error.to_string()))?;
        element
            .attributes
            .push((attribute.key.0.to_owned(), value.into_owned()));
    }
    Ok(element)
}

/// Refuses what XML 1.0 cannot carry, and line breaks and tabs, which an attribute would not keep.
fn check(value: &str, place: impl Fn() -> String) -> Result<(), Error> {
    match value
        .chars()
        .find(|c| c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}'))
    {
        Some(character) => Err(Error::Control {
            place: place(),
            character,
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn control_characters_are_refused_by_name() {
        for bad in ['\0', '\n', '\t', '\u{1b}', '\u{85}', '\u{ffff}'] {
            let tree = node("domain").child(node("title").text(format!("a{bad}b")));
            let error = tree.render().unwrap_err().to_string();
            assert!(error.starts_with("<title> holds"), "{error}");
            assert!(node("a").with("b", bad.to_string()).render().is_err());
        }
    }

    #[test]
    fn a_truncated_or_deep_document_is_refused() {
        assert!(Node::parse("<a><b></b>").is_err());
        assert!(Node::parse("").is_err());
        assert!(Node::parse(&"<a>".repeat(100_000)).is_err());
    }

    proptest! {
        /// Whatever text goes in, the same tree comes out: nothing can close an element or add one.
        #[test]
        fn what_is_written_is_read_back(value in "[^\\p{C}]{0,40}", text in "[^\\p{C}]{0,40}") {
            let tree = node("a").with("b", value).child(node("c").text(text.trim()));
            prop_assert_eq!(Node::parse(&tree.render().unwrap()).unwrap(), tree);
        }
    }
}
