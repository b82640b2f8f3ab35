//! The clients and the proxy against small servers that answer by script.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use walcast_testkit::wait::{self, LONG};
use walcast_testkit::{Proxy, RealtimeSocket, Refused, SseStream, TestPostgres, Vsn};

async fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, format!("http://{address}"))
}

/// Answers one HTTP request with these bytes and hangs up.
async fn answer_once(listener: TcpListener, answer: &'static str) -> String {
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        request.push(stream.read_u8().await.unwrap());
    }
    stream.write_all(answer.as_bytes()).await.unwrap();
    String::from_utf8(request).unwrap()
}

/// A server that pushes an event before it answers a join, then closes with a reason.
async fn scripted_socket(listener: TcpListener, vsn: Vsn) {
    let (stream, _) = listener.accept().await.unwrap();
    let mut socket = tokio_tungstenite::accept_async(stream).await.unwrap();
    let Some(Ok(Message::Text(join))) = socket.next().await else { panic!("no join came") };
    let join: Value = serde_json::from_str(&join).unwrap();
    let (reference, early, reply) = match vsn {
        Vsn::V1 => {
            let reference = join["ref"].clone();
            let reply = json!({"topic": "realtime:a", "event": "phx_reply", "payload": {"status": "ok", "response": {"n": 1}}, "ref": reference});
            (reference, json!({"topic": "realtime:a", "event": "early", "payload": {}, "ref": null}), reply)
        }
        Vsn::V2 => {
            let reference = join[1].clone();
            let reply = json!([reference, reference, "realtime:a", "phx_reply", {"status": "ok", "response": {"n": 1}}]);
            (reference, json!([null, null, "realtime:a", "early", {}]), reply)
        }
    };
    assert!(reference.is_string());
    socket.send(Message::text(early.to_string())).await.unwrap();
    socket.send(Message::text(reply.to_string())).await.unwrap();
    let reason = CloseFrame { code: 1012.into(), reason: "Server requested disconnect".into() };
    socket.close(Some(reason)).await.unwrap();
    while socket.next().await.is_some() {}
}

#[tokio::test]
async fn a_join_finds_its_reply_and_keeps_what_came_before_it() {
    for vsn in [Vsn::V1, Vsn::V2] {
        let (listener, base) = listen().await;
        let server = tokio::spawn(scripted_socket(listener, vsn));
        let mut socket = RealtimeSocket::connect(&base, "key", vsn).await.unwrap();
        let response = socket.join_ok("realtime:a", json!({}), Some("token")).await.unwrap();
        assert_eq!(response, json!({"n": 1}));
        assert_eq!(socket.next_event(LONG).await.unwrap().event, "early");
        let closed = socket.until_closed(LONG).await.unwrap();
        assert_eq!(closed, Some((1012, "Server requested disconnect".to_owned())));
        let error = socket.next_event(LONG).await.unwrap_err().to_string();
        assert!(error.contains("1012"), "{error}");
        server.await.unwrap();
    }
}

#[tokio::test]
async fn a_refused_socket_says_with_which_status() {
    let (listener, base) = listen().await;
    let server =
        tokio::spawn(answer_once(listener, "HTTP/1.1 401 Unauthorized\r\ncontent-length: 15\r\n\r\n{\"error\":\"key\"}"));
    let error = RealtimeSocket::connect(&base, "a/b", Vsn::V2).await.unwrap_err();
    assert_eq!(error.downcast_ref::<Refused>().map(|refused| refused.status), Some(401), "{error:?}");
    let request = server.await.unwrap();
    assert!(request.starts_with("GET /realtime/v1/websocket?apikey=a%2Fb&vsn=2.0.0 "), "{request}");
}

#[tokio::test]
async fn an_event_stream_sends_token_and_cursor_and_reads_until_the_end() {
    let (listener, base) = listen().await;
    let answer = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n: hi\n\nid: 7\ndata: {\"a\":1}\n\nevent: expired\ndata: x\n\n";
    let server = tokio::spawn(answer_once(listener, answer));
    let mut stream = SseStream::open(&format!("{base}/sse"), Some("secret"), Some("e/0/1/0")).await.unwrap();
    let request = server.await.unwrap().to_lowercase();
    assert!(request.contains("authorization: bearer secret") && request.contains("last-event-id: e/0/1/0"), "{request}");
    assert_eq!((stream.status(), stream.header("content-type")), (200, Some("text/event-stream")));
    let first = stream.next(LONG).await.unwrap();
    assert_eq!((first.id.as_deref(), first.json().unwrap()), (Some("7"), json!({"a": 1})));
    let rest = stream.until_end(LONG).await.unwrap();
    assert_eq!(rest.iter().map(|event| event.event.as_str()).collect::<Vec<_>>(), ["expired"]);
}

#[tokio::test]
async fn a_refused_event_stream_has_a_status_and_a_body() {
    let (listener, base) = listen().await;
    let server = tokio::spawn(answer_once(listener, "HTTP/1.1 403 Forbidden\r\ncontent-length: 4\r\n\r\nnope"));
    let stream = SseStream::open(&base, None, None).await.unwrap();
    assert_eq!(stream.status(), 403);
    assert_eq!(stream.text(LONG).await.unwrap(), "nope");
    server.await.unwrap();
}

/// Answers every byte with itself, on any number of connections.
async fn echo(listener: TcpListener) {
    while let Ok((mut stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            let (mut from, mut to) = stream.split();
            let _ = tokio::io::copy(&mut from, &mut to).await;
        });
    }
}

async fn echoes(stream: &mut TcpStream, byte: u8) -> bool {
    stream.write_all(&[byte]).await.is_ok() && stream.read_u8().await.is_ok_and(|answer| answer == byte)
}

#[tokio::test]
async fn a_proxy_passes_holds_cuts_and_refuses() {
    let (listener, _) = listen().await;
    let proxy = Proxy::to(listener.local_addr().unwrap().port()).await.unwrap();
    tokio::spawn(echo(listener));
    let mut client = TcpStream::connect(("127.0.0.1", proxy.port())).await.unwrap();
    assert!(echoes(&mut client, 1).await);

    proxy.pause();
    client.write_all(&[2]).await.unwrap();
    let held = tokio::time::timeout(Duration::from_millis(100), client.read_u8()).await;
    assert!(held.is_err(), "nothing passes a paused proxy");
    proxy.resume();
    assert_eq!(client.read_u8().await.unwrap(), 2, "what was held back is passed on");

    proxy.cut();
    assert!(client.read_u8().await.is_err(), "a cut closes the connection");
    let mut client = TcpStream::connect(("127.0.0.1", proxy.port())).await.unwrap();
    assert!(echoes(&mut client, 3).await, "and new ones are served");

    proxy.refuse();
    assert!(client.read_u8().await.is_err());
    let mut refused = TcpStream::connect(("127.0.0.1", proxy.port())).await.unwrap();
    assert!(!echoes(&mut refused, 4).await);
    proxy.resume();
    let mut client = TcpStream::connect(("127.0.0.1", proxy.port())).await.unwrap();
    assert!(echoes(&mut client, 5).await);
    drop(proxy);
    assert!(client.read_u8().await.is_err());
}

#[tokio::test]
async fn a_database_connection_is_lost_at_a_cut_and_comes_back() {
    let pg = TestPostgres::start().await.unwrap();
    let proxy = Proxy::to(pg.port()).await.unwrap();
    let (client, connection) = tokio_postgres::connect(&pg.url_through(&proxy), tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    client.simple_query("select 1").await.unwrap();
    proxy.cut();
    wait::until(LONG, "the client notices the cut", || async { client.is_closed() }).await.unwrap();
    assert!(tokio_postgres::connect(&pg.url_through(&proxy), tokio_postgres::NoTls).await.is_ok());
}
