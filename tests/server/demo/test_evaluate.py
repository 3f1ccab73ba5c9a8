"""Measuring through HTTP, against a stand-in whose answers are known."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console

from server.demo.data import leave_one_out
from server.demo.evaluate import (
    EvaluationError,
    EvaluationSettings,
    measure,
    sample_questions,
)


@contextmanager
def stand_in(answer) -> Iterator[tuple[str, list[dict]]]:
    """A server that answers each request body by ``answer(body) -> (status, headers, reply)``."""
    bodies: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            bodies.append({"path": self.path, **body})
            status, headers, reply = answer(body)
            content = json.dumps(reply).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64  # the default of 5 resets connections made at once

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", bodies
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def answers(tiny_data):
    """By history, the item that came next."""
    ids = tiny_data.item_ids
    questions = leave_one_out(tiny_data.sequences).test
    return {tuple(ids[row] for row in q.history): ids[q.target] for q in questions}


def reply(*item_ids):
    return 200, {}, {"items": [{"item_id": item_id, "score": -1.0} for item_id in item_ids]}


def test_ranks_of_the_right_answers_become_figures(tiny_data, answers):
    def second(body):
        return reply("other", answers[tuple(body["history"])])

    settings = EvaluationSettings(top_k=5, beam_width=7, normalization="vocab", concurrency=4)
    with stand_in(second) as (base_url, bodies):
        result = measure(base_url, tiny_data, settings)
    assert result.model.recall == 1.0
    assert result.model.ndcg == pytest.approx(1 / 1.584962500721156)
    assert result.model.users == result.questions == len(bodies) == 120
    assert {tuple(body["history"]) for body in bodies} == set(answers)
    for body in bodies:
        assert body["path"] == "/v1/recommend"
        assert (body["top_k"], body["beam_width"]) == (5, 7)
        assert body["normalization"] == "vocab"
        assert body["exclude_history"] is True
    assert 0 <= result.popularity.recall < 1


def test_a_sample_is_repeatable_and_answers_may_be_missing(tiny_data):
    settings = EvaluationSettings(users=30, seed=4)
    with stand_in(lambda _: reply("other")) as (base_url, bodies):
        done = []
        result = measure(base_url, tiny_data, settings, progress=done.append)
        assert sum(done) == len(bodies) == 30
        assert (result.model.recall, result.model.ndcg) == (0.0, 0.0)
        assert result.popularity.users == 30
        again = measure(base_url, tiny_data, settings)
        assert again.popularity == result.popularity
        assert {json.dumps(b) for b in bodies[:30]} == {json.dumps(b) for b in bodies[30:]}
    assert "normalization" not in bodies[0]
    console = Console(width=100)
    with console.capture() as shown:
        console.print(result.table())
    text = shown.get()
    assert "a sample of 30 users" in text
    assert "popularity" in text
    assert "Recall@10" in text


def test_a_full_server_is_asked_again(tiny_data):
    refusals = iter([True, True])

    def busy_at_first(body):
        if next(refusals, False):
            return 429, {"Retry-After": "0"}, {"error": {"message": "queue is full"}}
        return reply("other")

    with stand_in(busy_at_first) as (base_url, bodies):
        result = measure(base_url, tiny_data, EvaluationSettings(users=5))
    assert result.model.users == 5
    assert len(bodies) == 7


def test_an_error_answer_ends_the_measurement(tiny_data):
    def refuse(body):
        return 422, {}, {"error": {"message": "no such thing"}}

    with (
        stand_in(refuse) as (base_url, _),
        pytest.raises(EvaluationError, match=r"answered 422.*no such thing"),
    ):
        measure(base_url, tiny_data, EvaluationSettings(users=5))


def test_a_server_that_is_not_there_is_an_error(tiny_data):
    with stand_in(lambda _: reply()) as (base_url, _):
        pass
    with pytest.raises(EvaluationError, match=r"no answer from http://127\.0\.0\.1"):
        measure(base_url, tiny_data, EvaluationSettings(users=5, timeout_s=2))


def test_samples_and_settings():
    questions = leave_one_out([(0, 1, 2), (1, 2, 3), (2, 3, 4)]).test
    assert sample_questions(questions, None, 0) == questions
    assert sample_questions(questions, 9, 0) == questions
    assert len(set(sample_questions(questions, 2, 0))) == 2
    with pytest.raises(ValueError, match="users is 0"):
        EvaluationSettings(users=0)
    with pytest.raises(ValueError, match="concurrency is 0"):
        EvaluationSettings(concurrency=0)
