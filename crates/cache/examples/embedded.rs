//! The cache alone in a Rust program: no server, no PostgreSQL, a computation of one's own.
//!
//! `cargo run -p walcast-cache --example embedded`

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::future::join_all;
use walcast_cache::{Cache, CacheConfig, ComputeOptions, Computed, NamespaceConfig};
use walcast_model::{CacheKey, Tag};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let prices = NamespaceConfig {
        ttl: Some(Duration::from_secs(60)),
        // Old prices are answered while new ones are computed, and for an hour where that fails.
        stale_while_revalidate: Duration::from_secs(30),
        grace: Duration::from_secs(3600),
        refresh_ahead: Some(0.8),
        negative_ttl: Some(Duration::from_secs(5)),
        ..NamespaceConfig::default()
    };
    let mut config = CacheConfig { l1_bytes: 16 << 20, ..CacheConfig::default() };
    config.namespaces.insert("prices".into(), prices);
    let (cache, hand) = Cache::standalone(config);

    // What is slow, and how often it ran.
    let runs = Arc::new(AtomicUsize::new(0));
    let price_of = |article: &'static str| {
        let tags = Tag::parse(&format!("article:{article}")).into_iter().collect::<Vec<_>>();
        let (cache, runs) = (cache.clone(), runs.clone());
        move || {
            // Before the first read: what is invalidated from here on, this value may lack.
            let fence = cache.external_fence();
            let (tags, runs) = (tags.clone(), runs.clone());
            async move {
                let run = runs.fetch_add(1, Ordering::Relaxed) + 1;
                tokio::time::sleep(Duration::from_millis(20)).await;
                Ok::<_, Infallible>(match article {
                    "unicorn" => Computed::nothing(tags, fence),
                    _ => Computed::new(format!("{{\"cents\": {}}}", run * 100), "application/json", tags, fence),
                })
            }
        }
    };

    let (apple, unicorn) = (CacheKey::new("prices", "apple")?, CacheKey::new("prices", "unicorn")?);
    let options = ComputeOptions { soft_timeout: Some(Duration::from_millis(100)), ..ComputeOptions::default() };

    let herd = (0..1000).map(|_| cache.get_or_compute(&apple, &options, price_of("apple")));
    for answer in join_all(herd).await {
        assert_eq!(&answer?.entry.value[..], br#"{"cents": 100}"#);
    }
    println!("a thousand readers, {} computation", runs.load(Ordering::Relaxed));

    for _ in 0..2 {
        let answer = cache.get_or_compute(&unicorn, &options, price_of("unicorn")).await?;
        println!("unicorn: nothing = {}, from {:?}", answer.is_negative(), answer.source);
    }

    hand.invalidate(&[Tag::parse("article:apple")?]);
    let answer = cache.get_or_compute(&apple, &options, price_of("apple")).await?;
    println!("after the price changed: {} from {:?}", String::from_utf8_lossy(&answer.entry.value), answer.source);
    assert_eq!(runs.load(Ordering::Relaxed), 3);
    Ok(())
}
