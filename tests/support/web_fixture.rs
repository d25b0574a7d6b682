//! A web server with disks.

use std::sync::{Arc, Mutex};

/// By their paths.
pub type Files = Arc<Mutex<Vec<(&'static str, Vec<u8>)>>>;

/// A web server with these files, which answers ranges as they are asked for; and what was asked.
pub struct Web {
    pub host: String,
    pub files: Files,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Web {
    pub fn new(files: Vec<(&'static str, Vec<u8>)>) -> Self {
        use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
        let (asked, files) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(files)));
        let there = Arc::clone(&files);
        let log = Arc::clone(&asked);
        let answer = move |method: Method, uri: Uri, headers: HeaderMap| {
            let range = headers
                .get(header::RANGE)
                .map(|range| range.to_str().unwrap().to_owned());
            log.lock().unwrap().push(format!("{method} {}", uri.path()));
            let bytes = there
                .lock()
                .unwrap()
                .iter()
                .find(|(path, _)| *path == uri.path())
                .map(|(_, bytes)| bytes.clone());
            async move {
                let Some(bytes) = bytes else {
                    return (StatusCode::NOT_FOUND, HeaderMap::new(), Vec::new());
                };
                let mut headers = HeaderMap::new();
                let Some((first, last)) = range
                    .as_deref()
                    .and_then(|range| range.strip_prefix("bytes=")?.split_once('-'))
                else {
                    return (StatusCode::OK, headers, bytes);
                };
                let first: usize = first.parse().unwrap();
                let last = last.parse().unwrap_or(bytes.len() - 1);
                let part = format!("bytes {first}-{last}/{}", bytes.len());
                headers.insert(header::CONTENT_RANGE, part.parse().unwrap());
                (StatusCode::PARTIAL_CONTENT, headers, bytes[first..=last].to_vec())
            }
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime
            .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
            .unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let app = axum::Router::new().fallback(answer);
        // It serves until the test process ends.
        std::thread::spawn(move || {
            runtime.block_on(async move { axum::serve(listener, app).await.unwrap() })
        });
        Self { host, files, asked }
    }

    /// What was asked since the last look.
    pub fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}
