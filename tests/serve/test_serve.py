"""rmse-serve: answers as rmse-run gives them, to OpenAI's own client; and who is answered, when, and with what errors."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_one_line
from later import later

from rmse_edge.chat import ChatTemplate
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.cli.serve import main as rmse_serve
from rmse_edge.runtimes import LoopRuntime, open_runtime
from rmse_edge.runtimes.text.sampling import Sampler, Sampling
from rmse_edge.runtimes.text.writer import Writer
from rmse_edge.text import Tokenizer

pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'rmse-edge[serve]'")
openai = later("openai")
httpx2 = later("httpx2")
served = later("serve.served")

LONG, NAME = 4000, "tiny"


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.write_talker(tmp_path_factory.mktemp("serve") / "talker")


@pytest.fixture(scope="module")
def server(talker: Path) -> Iterator[Any]:
    with served.serving(talker, queue=2, prompt=200, max_body=20_000) as found:
        yield found


def run(folder: Path, capsys: pytest.CaptureFixture[str], *flags: object) -> dict[str, Any]:
    """What rmse-run says."""
    assert rmse_run([str(folder), "-o", "json", *map(str, flags)]) == 0
    return json.loads(capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("asked", "beyond", "flags"),
    [
        ({"seed": 3, "max_tokens": 40}, {}, ("--seed", 3, "-n", 40)),
        (
            {"temperature": 0, "max_tokens": 24},
            {"exit_threshold": 0.9, "min_loops": 2},
            ("--temperature", 0, "-n", 24, "--exit-threshold", 0.9, "--min-loops", 2),
        ),
        (
            {"seed": 2**53, "temperature": 1.5, "top_p": 0.9, "max_tokens": 30},
            {"top_k": 40, "max_loops": 2, "ignore_eos": True},
            ("--seed", 2**53, "--temperature", 1.5, "--top-p", 0.9, "-n", 30, "--top-k", 40, "--max-loops", 2, "--ignore-eos"),
        ),
        ({"seed": 1, "stop": ["e", "to"], "max_tokens": 60}, {}, ("--seed", 1, "--stop", "e", "--stop", "to", "-n", 60)),
    ],
)  # fmt: skip
def test_a_text_is_that_of_rmse_run(
    server: Any, talker: Path, capsys: pytest.CaptureFixture[str], asked: dict[str, Any], beyond: Any, flags: Any
):
    """In one document and as a stream, for OpenAI's client."""
    expected = run(talker, capsys, "-p", "to be 日", *flags)
    reason = {"eos": "stop"}.get(expected["finish_reason"], expected["finish_reason"])
    client, asked = server.client(), {"model": NAME, "prompt": "to be 日", "extra_body": beyond, **asked}
    found = client.completions.create(**asked)
    choice = found.choices[0]
    assert (choice.text, choice.tokens, choice.depth) == (expected["text"], expected["tokens"], expected["depth"])
    assert choice.finish_reason == reason
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (
        expected["prompt_tokens"], len(expected["tokens"]),
    )  # fmt: skip
    assert found.loops["mean_loops"] == expected["mean_loops"] and len(set(expected["depth"])) > 1
    assert "".join(span["text"] for span in choice.spans) == choice.text
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    assert "".join(part.choices[0].text for part in parts) == expected["text"]
    for name in ("tokens", "depth"):
        assert [n for part in parts for n in getattr(part.choices[0], name)] == expected[name]
    assert [span for part in parts for span in part.choices[0].spans] == choice.spans
    assert parts[-1].choices[0].finish_reason == reason and last.usage == found.usage and last.choices == []
    assert len({chunk.id for chunk in chunks}) == 1


def test_prompts_in_other_forms(server: Any, talker: Path, capsys: pytest.CaptureFixture[str]):
    client, asked = server.client(), {"model": NAME, "max_tokens": 12, "seed": 5}
    first = client.completions.create(prompt="to be", **asked)
    assert client.completions.create(prompt=["to be"], **asked).choices[0].text == first.choices[0].text
    echoed = client.completions.create(prompt="to be", echo=True, **asked).choices[0]
    assert echoed.text == "<s>to be" + first.choices[0].text
    expected = run(talker, capsys, "--prompt-tokens", "7,300,12", "-n", 12, "--seed", 5)
    for prompt in ([7, 300, 12], [[7, 300, 12]]):
        assert client.completions.create(prompt=prompt, **asked).choices[0].tokens == expected["tokens"]
    # Without a seed every answer is another, and says how to have it once more.
    one, two = (client.completions.create(model=NAME, prompt="to be", max_tokens=30) for _ in range(2))
    assert one.choices[0].tokens != two.choices[0].tokens
    again = client.completions.create(model=NAME, prompt="to be", max_tokens=30, seed=one.seed)
    assert again.choices[0].tokens == one.choices[0].tokens


def test_a_model_without_a_tokenizer(talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bare = tmp_path / "bare"
    shutil.copytree(talker, bare)
    for name in ("tokenizer.json", "chat_template.jinja"):
        (bare / name).unlink()
    expected = run(bare, capsys, "--prompt-tokens", "7,8", "-n", 6, "--seed", 1)
    with served.serving(bare) as server:
        client = server.client()
        choice = client.completions.create(model=NAME, prompt=[7, 8], max_tokens=6, seed=1).choices[0]
        assert (choice.text, choice.tokens) == (expected["text"], expected["tokens"])
        with pytest.raises(openai.BadRequestError, match="has no tokenizer"):
            client.completions.create(model=NAME, prompt="to be")
        with pytest.raises(openai.BadRequestError, match="no template"):
            client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "he"}])


# -------------------------------------------------------------------------------------------------------------- chats


def told(server: Any, questions: list[str], answers: list[str], **asked: Any) -> Any:
    """The next answer of a conversation that begins with a system message."""
    messages = [{"role": "system", "content": "be brief"}]
    for question, answer in zip(questions, [*answers, None]):
        messages.append({"role": "user", "content": question})
        messages += [] if answer is None else [{"role": "assistant", "content": answer}]
    return server.client().chat.completions.create(model=NAME, messages=messages, max_tokens=12, **asked)


QUESTIONS = ["he", "and a", "why?"]


def read_anew(folder: Path, questions: list[str], answers: list[str], seed: int) -> list[int]:
    """The tokens of the same answer, from a runtime that has read nothing before."""
    runtime = open_runtime(folder)
    assert isinstance(runtime, LoopRuntime)
    tokenizer = Tokenizer(folder / "tokenizer.json")
    writer = Writer(runtime, tokenizer, runtime.info.dials, Sampler(Sampling(seed=seed)), 12)
    conversation = writer.conversation(ChatTemplate.open(folder))
    conversation.messages.append({"role": "system", "content": "be brief"})
    for question, answer in zip(questions, answers):
        conversation.messages.append({"role": "user", "content": question})
        conversation.messages.append({"role": "assistant", "content": answer})
    generation = conversation.ask(questions[-1])
    assert list(generation.spans())
    return generation.tokens


def test_turns_of_a_conversation_are_those_of_rmse_run(
    talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Each reads only what is new, from the state that was kept; with nothing kept it reads all anew."""
    session, expected = tmp_path / "talk.session", []
    for turn, question in enumerate(QUESTIONS):
        before = ("--session", session) if turn else ("--system", "be brief")
        flags = ("--chat", "-p", question, "-n", 12, "--seed", turn, *before, "--save-session", session)
        expected.append(run(talker, capsys, *flags))
    texts = [answer["text"] for answer in expected]
    with served.serving(talker) as server:
        for turn, answer in enumerate(expected):
            found = told(server, QUESTIONS[: turn + 1], texts[:turn], seed=turn)
            choice, cached = found.choices[0], found.usage.prompt_tokens_details.cached_tokens
            assert (choice.message.content, choice.tokens) == (answer["text"], answer["tokens"])
            assert choice.depth == answer["depth"]
            assert found.usage.prompt_tokens - cached == answer["prompt_tokens"] and (cached > 0) == (turn > 0)
        assert len(server.engine.sessions) == 3
        # The second turn once more, as a stream; and with other dials, whose state is another.
        parts = list(told(server, QUESTIONS[:2], texts[:1], seed=1, stream=True))
        assert parts[0].choices[0].delta.role == "assistant"
        assert "".join(part.choices[0].delta.content or "" for part in parts) == texts[1]
        other = told(server, QUESTIONS[:2], texts[:1], seed=1, extra_body={"max_loops": 2})
        assert other.usage.prompt_tokens_details.cached_tokens == 0 and max(other.choices[0].depth) == 2
        parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "e"}]
        messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}]
        found = server.client().chat.completions.create(model=NAME, messages=messages, max_tokens=12, seed=0)
        assert found.choices[0].message.content == texts[0]
    with served.serving(talker, session_bytes=0) as server:
        found = told(server, QUESTIONS, texts[:2], seed=2)
        assert found.usage.prompt_tokens_details.cached_tokens == 0 == len(server.engine.sessions)
        assert found.choices[0].tokens == read_anew(talker, QUESTIONS, texts[:2], seed=2)


def test_kept_conversations_stay_within_their_memory(talker: Path):
    with served.serving(talker, session_bytes=1 << 40) as server:
        told(server, ["a"], [], seed=0)
        one = server.engine.sessions.nbytes
    with served.serving(talker, session_bytes=int(2.5 * one)) as server:
        sessions = server.engine.sessions
        said = [told(server, [q], [], seed=0).choices[0].message.content for q in "abc"]
        assert len(sessions) == 2 and one < sessions.nbytes <= sessions.budget
        assert server.metric("rmse_session_bytes") == sessions.nbytes and sessions.evicted == 1

        def cached(question: str, answer: str) -> int:
            found = told(server, [question, "he"], [answer], seed=0)
            return found.usage.prompt_tokens_details.cached_tokens

        assert cached("b", said[1]) > 0  # which makes it the newest but for its own next turn, in the place of c
        assert cached("c", said[2]) == 0 == cached("a", said[0])


def test_speculation_says_the_same(server: Any):
    """Greedy tokens and their depths."""
    asked = {"model": NAME, "prompt": "to be", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    plain = server.post("/v1/completions", asked).json()
    fast = server.post("/v1/completions", asked | {"speculate": 1, "draft_tokens": 4}).json()
    assert [fast["choices"][0][name] for name in ("text", "tokens", "depth")] == [
        plain["choices"][0][name] for name in ("text", "tokens", "depth")
    ]
    assert fast["speculation"]["draft_tokens"] == 4 and fast["speculation"]["tokens_per_round"] >= 1
    assert "speculation" not in plain


# ------------------------------------------------------------------------------------------------------------- errors

TEXT = {"model": NAME, "prompt": "to be", "max_tokens": 3}
CHAT = {"model": NAME, "messages": [{"role": "user", "content": "he"}]}


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "said"),
    [
        ("completions", b"{", 400, None, "not readable as JSON"),
        ("completions", b'{"model": "a", "model": "b"}', 400, None, "occurs twice"),
        ("completions", b"\xff", 400, None, "not readable as JSON"),
        ("completions", b"[]", 400, None, "not a JSON object"),
        ("completions", b"[" * 10_000, 400, None, "nested"),
        ("completions", b'{"temperature": NaN}', 400, None, "NaN is not a number"),
        ("completions", TEXT | {"model": "gpt-4o"}, 404, "model", "'gpt-4o' is not served here; 'tiny' is"),
        ("completions", {"prompt": "a"}, 400, "model", "model: is missing"),
        ("completions", {"model": NAME}, 400, "prompt", "prompt: is missing"),
        ("completions", TEXT | {"temprature": 1}, 400, "temprature", "unknown field; known: model"),
        ("completions", TEXT | {"messages": []}, 400, "messages", "unknown field"),
        ("completions", TEXT | {"max_tokens": "3"}, 400, "max_tokens", "got '3', expected a whole number"),
        ("completions", TEXT | {"max_tokens": 4001}, 400, "max_tokens", "writes 4000 at most"),
        ("completions", TEXT | {"max_tokens": 0}, 400, "max_tokens", "got 0"),
        ("completions", TEXT | {"temperature": -1}, 400, "temperature", "got -1"),
        ("completions", TEXT | {"temperature": 10**400}, 400, "temperature", "temperature: got"),
        ("completions", TEXT | {"seed": -1}, 400, "seed", "a whole number from 0"),
        ("completions", TEXT | {"stop": [""]}, 400, "stop", "a text to stop at"),
        ("completions", TEXT | {"stream": 1}, 400, "stream", "true or false"),
        ("completions", TEXT | {"stream_options": {"usage": True}}, 400, "stream_options", "stream_options.usage: unknown field"),
        ("completions", TEXT | {"n": 2}, 400, "n", "n: got 2, supported is 1"),
        ("completions", TEXT | {"logprobs": 3}, 400, "logprobs", "not supported"),
        ("completions", TEXT | {"prompt": ["a", "b"]}, 400, "prompt", "one prompt a request"),
        ("completions", TEXT | {"prompt": []}, 400, "prompt", "an empty list"),
        ("completions", TEXT | {"prompt": [320]}, 400, "prompt", "outside the vocabulary"),
        ("completions", TEXT | {"prompt": "to be " * 300}, 400, "prompt", "more than the 200 that this server reads"),
        ("completions", TEXT | {"prompt": "\\ud800"}, 200, None, ""),
        ("completions", b'{"model": "tiny", "prompt": "\\ud800"}', 400, None, "not readable as JSON"),
        ("completions", TEXT | {"max_loops": 5}, 400, "max_loops", "expected 1..4"),
        ("completions", TEXT | {"exit_kl": 0.1}, 400, "exit_kl", "has no such rule"),
        ("completions", TEXT | {"exit_threshold": 0}, 400, "exit_threshold", "a positive number"),
        ("completions", TEXT | {"prefix": "all"}, 400, "prefix", "has none"),
        ("completions", TEXT | {"speculate": 4}, 400, "speculate", "speculate: got 4, expected 1..3, fewer loops"),
        ("completions", TEXT | {"speculate": "heads"}, 400, "speculate", "has no heads that draft"),
        ("completions", TEXT | {"speculate": "tails"}, 400, "speculate", "expected a number of loops, heads or auto"),
        ("completions", TEXT | {"draft_tokens": 2}, 400, "draft_tokens", "needs speculate"),
        ("completions", TEXT | {"speculate": 1, "draft_tokens": 64}, 400, "draft_tokens", "got 64, expected 1..63"),
        ("completions", TEXT | {"prompt": "x" * 20_000}, 413, None, "larger than 20000 bytes"),
        ("chat/completions", CHAT | {"messages": []}, 400, "messages", "1 to 10000 items"),
        ("chat/completions", CHAT | {"messages": [{"role": "user"}]}, 400, "messages", "messages[0].content: is missing"),
        ("chat/completions", CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "text"),
        ("chat/completions", CHAT | {"messages": [{"role": "assistant", "content": "a"}]}, 400, "messages", "must be the user's"),
        ("chat/completions", CHAT | {"tools": [{}]}, 400, "tools", "not supported"),
        ("chat/completions", CHAT | {"prompt": "a"}, 400, "prompt", "unknown field"),
    ],
)  # fmt: skip
def test_what_is_refused_is_one_line_in_openais_shape(
    server: Any, path: str, body: Any, status: int, param: str | None, said: str
):
    answer = server.post(f"/v1/{path}", body)
    assert answer.status_code == status
    if status == 200:
        return
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert_one_line(error["message"] + "\n", said)


def test_what_is_refused_before_it_is_read(server: Any):
    assert server.post("/v1/completions", TEXT, **{"content-type": "text/plain"}).status_code == 415
    # In pieces, of which nobody said how many.
    answer = httpx2.post(
        server.url + "/v1/completions",
        content=(b"x" * 1000 for _ in range(1000)),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 413
    for method, path, status in (("GET", "/v1/completions", 405), ("GET", "/nothing", 404), ("POST", "/health", 405)):
        answer = httpx2.request(method, server.url + path)
        assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"
    assert server.client().models.list().data[0].id == NAME
    with pytest.raises(openai.NotFoundError):
        server.client().models.retrieve("other")
    assert server.client().models.retrieve(NAME).max_loops == 4


def test_a_defect_is_an_error_of_the_server_which_goes_on(server: Any, monkeypatch: pytest.MonkeyPatch):
    pick, count = Sampler.pick, 0

    def fails_once(self: Sampler, *args: Any) -> int:
        nonlocal count
        count += 1
        if count == 3:
            raise RuntimeError("a secret")
        return pick(self, *args)

    monkeypatch.setattr(Sampler, "pick", fails_once)
    client = server.client()
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(**TEXT)
    assert "secret" not in str(caught.value)
    count = 0
    with pytest.raises(openai.APIError, match="the server failed"):
        list(client.completions.create(**TEXT, stream=True))
    assert client.completions.create(**TEXT).usage.completion_tokens == 3


# ------------------------------------------------------------------------------------------- the line, and who leaves it


def streamed(server: Any, count: int = LONG) -> Any:
    """A stream that has begun."""
    stream = server.client().completions.create(
        model=NAME, prompt="to be", max_tokens=count, extra_body={"ignore_eos": True}, stream=True
    )
    next(iter(stream))
    return stream


def test_a_full_line_refuses_and_who_leaves_makes_room(server: Any):
    engine, made = server.engine, server.metric("rmse_generated_tokens_total")
    stream = streamed(server)
    sockets = []
    for waiting in (1, 2):
        sockets.append(raw(server, TEXT))
        served.soon(lambda n=waiting: engine.waiting == n)
    with pytest.raises(openai.RateLimitError, match="2 requests are waiting") as caught:
        server.client().completions.create(**TEXT)
    assert caught.value.response.headers["retry-after"] == "1"
    sockets[0].close()  # one that waits leaves the line at once
    served.soon(lambda: engine.waiting == 1)
    assert len(engine.jobs) == 2
    stream.close()  # the one that is served: the next one's turn comes
    answer = read_all(sockets[1])
    assert answer.startswith("HTTP/1.1 200") and '"completion_tokens":3' in answer
    served.soon(lambda: not engine.jobs)
    assert server.metric("rmse_generated_tokens_total") - made < LONG / 2


def raw(server: Any, body: dict[str, Any]) -> socket.socket:
    """A connection that has asked."""
    data = json.dumps(body).encode()
    found = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    found.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return found


def read_all(connection: socket.socket) -> str:
    with connection:
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


def test_who_leaves_ends_what_is_written(server: Any):
    """Not streamed: nobody reads anything before the end."""
    engine, left = server.engine, server.metric("rmse_left_total")
    connection = raw(server, TEXT | {"max_tokens": LONG, "ignore_eos": True})
    served.soon(lambda: any(job.generation and job.generation.made for job in list(engine.jobs.values())))
    connection.close()
    served.soon(lambda: not engine.jobs)
    assert server.metric("rmse_left_total") == left + 1


def test_dials_can_be_turned_while_a_text_is_written(server: Any):
    client = server.client()
    stream = client.completions.create(
        model=NAME, prompt="to be", max_tokens=LONG, stream=True, extra_body={"exit_threshold": 1, "ignore_eos": True}
    )
    depths, answer = [], None
    for chunk in stream:
        depths += chunk.choices[0].depth
        if len(depths) >= 5 and answer is None:
            wrong = httpx2.patch(f"{server.url}/v1/completions/{chunk.id}", json={"loops": 1})
            assert wrong.status_code == 400 and "is no dial" in wrong.json()["error"]["message"]
            answer = httpx2.patch(f"{server.url}/v1/completions/{chunk.id}", json={"max_loops": 2})
        if answer is not None and depths[-1] != 4:
            break
    stream.close()
    assert depths[0] == 4 and depths[-1] == 2
    assert answer.status_code == 200 and answer.json()["dials"]["max_loops"] == 2
    served.soon(lambda: not server.engine.jobs)
    gone = httpx2.patch(f"{server.url}/v1/completions/{chunk.id}", json={"max_loops": 2})
    assert gone.status_code == 404


def test_an_answer_that_the_server_ends_does_not_look_whole(talker: Path):
    with served.serving(talker) as server:
        stream = streamed(server)
        said: list[BaseException] = []

        def read() -> None:
            try:
                for _ in stream:
                    pass
            except openai.APIError as error:
                said.append(error)

        reading = threading.Thread(target=read)
        reading.start()
        server.stop()
        reading.join(30)
        assert len(said) == 1 and "shutting down" in str(said[0])


# --------------------------------------------------------------------------------------------------- who is answered


def test_a_key_is_asked_for_where_there_is_one(talker: Path):
    with served.serving(talker, keys=["first-key-of-two", "second-key-of-two"]) as server:
        for key in ("first-key-of-two", "second-key-of-two"):
            assert server.client(key).completions.create(**TEXT).usage.completion_tokens == 3
        for key in ("first-key-of-tw", "first-key-of-two2", "other"):
            with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
                server.client(key).completions.create(**TEXT)
        for path, status in (("/", 200), ("/health", 200), ("/metrics", 401), ("/v1/models", 401)):
            assert httpx2.get(server.url + path).status_code == status


def test_only_names_of_this_machine_are_answered_to(talker: Path):
    with served.serving(talker, hosts=["localhost", "127.0.0.1"]) as server:
        for host, status in (("localhost", 200), ("LOCALHOST:99", 200), ("elsewhere.example", 421), ("", 421)):
            assert httpx2.get(server.url + "/health", headers={"host": host}).status_code == status
        answer = httpx2.options(
            server.url + "/v1/completions",
            headers={"origin": "http://elsewhere.example", "access-control-request-method": "POST"},
        )
        assert answer.status_code == 405 and not any(name.startswith("access-control") for name in answer.headers)
        page = httpx2.get(server.url + "/")
        assert "default-src 'self'" in page.headers["content-security-policy"]


def test_what_it_counts(server: Any):
    client, before = server.client(), server.metric("rmse_generated_tokens_total")
    made = client.completions.create(model=NAME, prompt="to be", max_tokens=10, seed=3, extra_body={"ignore_eos": True})
    assert server.metric("rmse_generated_tokens_total") == before + 10 and len(made.choices[0].depth) == 10
    assert 1 < server.metric("rmse_mean_loops") < 4
    assert server.metric("rmse_queue_capacity") == 2 and server.metric("rmse_running") == 0
    if sys.platform == "linux":
        assert server.metric("process_resident_memory_bytes") > 50e6
    assert httpx2.get(server.url + "/health").json() == {"status": "ok"}


# --------------------------------------------------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted(talker: Path, capsys: pytest.CaptureFixture[str]):
    # A process started in the background inherits an ignored SIGINT; a person's shell does not.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from rmse_edge.cli.serve import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, str(talker), "--port", "0", "--name", NAME, "-t", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        found = re.fullmatch(r"tiny on (http://127\.0\.0\.1:\d+)\n", process.stdout.readline())
        assert found
        expected = run(talker, capsys, "-p", "to be", "-n", 9, "--seed", 4)
        client = openai.OpenAI(base_url=found[1] + "/v1", api_key="none")
        made = client.completions.create(model=NAME, prompt="to be", max_tokens=9, seed=4)
        assert made.choices[0].tokens == expected["tokens"]
        answer = httpx2.get(found[1] + "/health", headers={"host": "elsewhere.example"})
        assert answer.status_code == 421
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 130 and err.strip() == "rmse-serve: interrupted"
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--host", "0.0.0.0"],
            "--host 0.0.0.0: whoever reaches this machine could use the model; give --api-key-file",
        ),
        (["--host", "::"], "give --api-key-file"),
        (["--api-key-file", "EMPTY"], "holds no key"),
        (["--api-key-file", "SHORT"], "key 2 has less than 16 characters"),
        (["--port", "65536"], "--port: got '65536'"),
        (["--max-body", "1MB"], "expected bytes such as"),
        (["--port", "TAKEN"], "cannot be listened on"),
        (["--gamma", "1"], "--gamma: needs a knowledge base"),
    ],
)
def test_mistakes_of_the_command(
    talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
):
    (tmp_path / "EMPTY").write_text("\n \n")
    (tmp_path / "SHORT").write_text("long-enough-for-a-key\nshort\n")
    taken = socket.create_server(("127.0.0.1", 0))
    names = {"TAKEN": str(taken.getsockname()[1]), **{n: str(tmp_path / n) for n in ("EMPTY", "SHORT")}}
    with taken:
        assert rmse_serve([str(talker), *(names.get(flag, flag) for flag in flags)]) == 2
    assert_one_line(capsys.readouterr().err, "rmse-serve: error:", said)
