//! A headless Chromium, told what to do over its debugging protocol.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

/// A page takes no longer to become what a test waits for.
const PATIENCE: Duration = Duration::from_secs(45);

/// A browser with one page. It believes any certificate, since the test's authority is not installed.
pub struct Chromium {
    child: Child,
    _folder: tempfile::TempDir,
    socket: WebSocketStream<TcpStream>,
    page: String,
    next: u64,
}

impl Chromium {
    pub async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut child = Command::new("chromium")
            .args([
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--ignore-certificate-errors",
                "--remote-debugging-port=0",
                "--window-size=1000,700",
            ])
            .arg(format!("--user-data-dir={}", folder.path().display()))
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut lines = lines.map(Result::unwrap);
        let address = lines
            .find_map(|line| line.strip_prefix("DevTools listening on ").map(str::to_owned))
            .unwrap();
        // Else it would stop when nobody reads what else it says.
        std::thread::spawn(move || lines.for_each(drop));
        let port = address.split([':', '/']).nth(4).unwrap().to_owned();
        let tcp = TcpStream::connect(format!("127.0.0.1:{port}")).await.unwrap();
        let (socket, _) = tokio_tungstenite::client_async(address, tcp).await.unwrap();
        let mut chromium = Self {
            child,
            _folder: folder,
            socket,
            page: String::new(),
            next: 0,
        };
        let target = chromium
            .call("Target.createTarget", json!({"url": "about:blank"}))
            .await;
        let attach = json!({"targetId": target["targetId"], "flatten": true});
        let session = chromium.call("Target.attachToTarget", attach).await;
        chromium.page = session["sessionId"].as_str().unwrap().to_owned();
        chromium
    }

    async fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.next += 1;
        let mut request = json!({"id": self.next, "method": method, "params": parameters});
        if !self.page.is_empty() {
            request["sessionId"] = json!(self.page);
        }
        self.socket
            .send(Message::text(request.to_string()))
            .await
            .unwrap();
        loop {
            let Message::Text(text) = self.socket.next().await.unwrap().unwrap() else {
                continue;
            };
            let answer: Value = serde_json::from_str(&text).unwrap();
            if answer["id"] == json!(self.next) {
                assert!(answer["error"].is_null(), "{method}: {answer}");
                return answer["result"].clone();
            }
        }
    }

    pub async fn open(&mut self, address: &str) {
        self.call("Page.navigate", json!({"url": address})).await;
    }

    /// What an expression comes to, in the page.
    pub async fn value(&mut self, expression: &str) -> Value {
        let parameters = json!({"expression": expression, "returnByValue": true});
        self.call("Runtime.evaluate", parameters).await["result"]["value"].clone()
    }

    /// Waits until an expression is true in the page.
    pub async fn until(&mut self, expression: &str) {
        let end = Instant::now() + PATIENCE;
        while self.value(expression).await != json!(true) {
            if Instant::now() > end {
                let text = self.value("document.body.innerText").await;
                panic!("waited until {expression}; the page says {text}");
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Types text, and presses Enter behind it.
    pub async fn type_line(&mut self, text: &str) {
        self.call("Input.insertText", json!({"text": text})).await;
        for kind in ["keyDown", "keyUp"] {
            let enter = json!({"type": kind, "key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"});
            self.call("Input.dispatchKeyEvent", enter).await;
        }
    }

    /// A picture of the page, as PNG.
    pub async fn picture(&mut self) -> Vec<u8> {
        let picture = self
            .call("Page.captureScreenshot", json!({"format": "png"}))
            .await;
        BASE64.decode(picture["data"].as_str().unwrap()).unwrap()
    }
}

impl Drop for Chromium {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
