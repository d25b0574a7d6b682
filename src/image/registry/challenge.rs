//! What a registry asks for when it answers 401 (`WWW-Authenticate`, RFC 9110 §11.6.1).

/// One way to prove who we are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::image) enum Challenge {
    /// A token from `realm` (the distribution project's token authentication).
    Bearer { realm: String, service: Option<String> },
    /// User and password with each request.
    Basic,
}

/// Reads one header; unknown schemes are passed over.
pub(in crate::image) fn parse(header: &str) -> Vec<Challenge> {
    let mut found: Vec<(String, Vec<(String, String)>)> = Vec::new();
    let mut rest = header;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c)));
        let (word, after) = rest.split_at(end.unwrap_or(rest.len()));
        if word.is_empty() {
            break;
        }
        rest = after;
        let Some(value) = after.trim_start().strip_prefix('=') else {
            found.push((word.to_ascii_lowercase(), Vec::new()));
            continue;
        };
        let (value, after) = parameter(value.trim_start());
        rest = after;
        if let Some((_, parameters)) = found.last_mut() {
            parameters.push((word.to_ascii_lowercase(), value));
        }
    }
    found
        .into_iter()
        .filter_map(|(scheme, parameters)| challenge(&scheme, &parameters))
        .collect()
}

fn challenge(scheme: &str, parameters: &[(String, String)]) -> Option<Challenge> {
    let get = |name: &str| {
        parameters
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.clone())
    };
    match scheme {
        "bearer" => Some(Challenge::Bearer {
            realm: get("realm")?,
            service: get("service"),
        }),
        "basic" => Some(Challenge::Basic),
        _ => None,
    }
}

/// A quoted string or a token, and what follows it.
fn parameter(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ', '\t']).unwrap_or(text.len());
        let (value, rest) = text.split_at(end);
        return (value.to_owned(), rest);
    };
    let mut value = String::new();
    let mut escaped = false;
    for (at, c) in quoted.char_indices() {
        match c {
            '\\' if !escaped => escaped = true,
            '"' if !escaped => return (value, &quoted[at + 1..]),
            _ => {
                value.push(c);
                escaped = false;
            }
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bearer(realm: &str, service: Option<&str>) -> Challenge {
        Challenge::Bearer {
            realm: realm.to_owned(),
            service: service.map(str::to_owned),
        }
    }

    #[test]
    fn the_challenges_of_real_registries_are_read() {
        for (header, expected) in [
            (
                r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#,
                vec![bearer("https://auth.docker.io/token", Some("registry.docker.io"))],
            ),
            (r#"Basic realm="Registry Realm""#, vec![Challenge::Basic]),
            ("Basic", vec![Challenge::Basic]),
            (
                r#"bearer realm = "https://r/t""#,
                vec![bearer("https://r/t", None)],
            ),
            (
                r#"Negotiate, Basic realm="a, b", Bearer realm="https://r/\"t", service=x"#,
                vec![Challenge::Basic, bearer("https://r/\"t", Some("x"))],
            ),
            (r#"Bearer service="x""#, vec![]),
            ("", vec![]),
            ("=,=", vec![]),
        ] {
            assert_eq!(parse(header), expected, "{header}");
        }
    }

    proptest! {
        #[test]
        fn no_header_is_too_strange(header in ".{0,200}") {
            parse(&header);
        }
    }
}
