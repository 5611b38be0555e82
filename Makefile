# `make demo` and `make test` need nothing before them: they set up what is missing.
.DEFAULT_GOAL := help
.PHONY: help setup demo up test fmt clippy openapi sqlx test-peft test-inference fuzz-api fuzz bench-api bench-upload bench-hostile bench-engine bench-tuning bench-demo bench-growth bench-workers chaos chaos-short bench-queue mini-vtab reproduce

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: ## libtorch, the demo's backbone, and a look at the system packages
	@scripts/setup.sh

demo: setup ## the main job, end to end, on real images; results in demo/out
	cargo build --release
	python3 demo/run.py

up: setup ## keep the service running: http://127.0.0.1:8080/docs
	cargo run --release -- up --backbone-root .assets --dataset-root demo

test: ## every check: formatting, lints, tests, the demo on a handful of images
	@scripts/test.sh

fmt: ## format the code
	cargo fmt --all

clippy: ## lints, with and without libtorch
	cargo clippy --release --workspace --all-targets -- -D warnings
	cargo clippy --release --all-targets --no-default-features --features chaos -- -D warnings

openapi: ## write openapi/openapi.json anew after a change of the API
	cargo run --release --quiet -- openapi >openapi/openapi.json.new
	mv openapi/openapi.json.new openapi/openapi.json

sqlx: ## write .sqlx anew after a change of a query or a migration
	scripts/with_postgres.sh scripts/prepare_queries.sh

test-peft: setup ## prompts from and to the real peft package, through a running server; fetches PyTorch and peft once
	cargo build --release
	scripts/with_postgres.sh $$(scripts/peft_python.sh) scripts/test_peft.py target/release/promptweave

test-inference: setup ## the snippets for timm and Hugging Face of docs/guide/inference.md beside `predict`; fetches both packages once
	cargo build --release
	$$(scripts/inference_python.sh) scripts/test_inference.py $${CARGO_TARGET_DIR:-target}/release/promptweave

fuzz-api: setup ## a generated client and schemathesis against a running service, with a key and without; fetches both once
	cargo build --release
	scripts/with_postgres.sh $$(scripts/schemathesis_python.sh) scripts/fuzz_api/run.py $${CARGO_TARGET_DIR:-target}/release/promptweave

chaos: ## kill -9, SIGSTOP, a database that dies: whether the queue keeps its promises, in about twenty minutes; writes docs/reliability.md
	cargo build --release --no-default-features --features chaos --bin promptweave-chaos
	python3 tests/chaos/run.py $${CARGO_TARGET_DIR:-target}/release/promptweave-chaos

chaos-short: ## the same in three minutes, of everything a little
	scripts/chaos_short.sh

reproduce: setup mini-vtab ## every method on every task of the mini-VTAB; PROFILE zero-shot (default), small or full, in hours; goes on where it was
	cargo build --release --package promptweave-lab
	scripts/reproduce.sh $${PROFILE:-zero-shot} $${OUT:-.assets/mini-vtab}

mini-vtab: ## ten small tasks in VTAB-1k's layout, into OUT (.assets/mini-vtab), in two minutes; fetches 370 MB once
	scripts/mini_vtab.sh $${OUT:-.assets/mini-vtab}

fuzz: ## cargo-fuzz on what reads strangers' bytes, SECONDS_EACH (600) a target
	scripts/fuzz.sh

bench-api: ## the registry beside MLflow's on the same PostgreSQL, in minutes; fetches MLflow once
	cargo build --release --no-default-features --bin promptweave --bench api
	POSTGRES_DURABLE=1 scripts/with_postgres.sh python3 benches/bench_api.py --mlflow $$(benches/mlflow.sh) \
		--program $${CARGO_TARGET_DIR:-target}/release/promptweave \
		--load $$(ls -t $${CARGO_TARGET_DIR:-target}/release/deps/api-* | grep -v '[.]d$$' | head -n 1)

bench-queue: ## the job queue beside graphile-worker's and procrastinate's on the same PostgreSQL, in minutes; fetches both once
	cargo build --release --no-default-features --bin promptweave --bench api --bench queue
	POSTGRES_DURABLE=1 scripts/with_postgres.sh python3 benches/bench_queue.py --peers $$(benches/queue_peers.sh) \
		--program $${CARGO_TARGET_DIR:-target}/release/promptweave \
		--load $$(ls -t $${CARGO_TARGET_DIR:-target}/release/deps/api-* | grep -v '[.]d$$' | head -n 1) \
		--queue $$(ls -t $${CARGO_TARGET_DIR:-target}/release/deps/queue-* | grep -v '[.]d$$' | head -n 1)

bench-upload: ## the API's memory while a dataset of 2 GiB is uploaded, in minutes
	cargo build --release --no-default-features --bin promptweave
	scripts/with_postgres.sh python3 benches/bench_upload.py --program $${CARGO_TARGET_DIR:-target}/release/promptweave

bench-hostile: ## how soon bombs are refused, and with what memory; fails above a second or 512 MiB
	cargo build --release --no-default-features --bin promptweave
	scripts/with_postgres.sh python3 benches/bench_hostile.py --program $${CARGO_TARGET_DIR:-target}/release/promptweave

bench-engine: setup ## promptweave beside the machine's matrix rate and plain PyTorch, in ten minutes; fetches PyTorch once
	python3 benches/bench_engine.py

bench-tuning: setup ## `promptweave tune` beside a plain PyTorch loop of the same model, in ten minutes; fetches PyTorch once
	python3 benches/bench_tuning.py

bench-demo: setup ## the demo's composition by every path and precision, and what one more source costs, in minutes
	python3 benches/bench_demo.py

bench-workers: setup ## one job shared by several workers, with kills in the middle, in minutes
	cargo build --release
	scripts/with_postgres.sh python3 benches/bench_workers.py $${CARGO_TARGET_DIR:-target}/release/promptweave

bench-growth: setup ## time and memory as sources and samples grow, in a few minutes
	python3 benches/bench_growth.py
