"""Over HTTP: a request whose step raises is a 500 or an error frame, and nobody else notices."""

import json
from concurrent.futures import ThreadPoolExecutor

from turnout.tests.helpers.waiting import eventually

BAD = 320  # a token that no step survives
BODY = {"max_tokens": 20, "temperature": 0, "ignore_eos": True}


def test_a_request_at_fault_is_an_error_and_the_server_goes_on(serve):
    served = serve()
    forward = served.engine.runner.forward

    def broken(plan):
        if any(item.request.prompt_token_ids[0] == BAD and item.end > 5 for item in plan.scheduled):
            raise RuntimeError("no such kernel: /secret/path")
        return forward(plan)

    expected = served.post(prompt="The list", **BODY).json()["choices"]
    served.engine.runner.forward = broken
    with ThreadPoolExecutor(4) as pool:
        fine = [pool.submit(served.post, prompt="The list", **BODY) for _ in range(2)]
        whole = pool.submit(served.post, prompt=[BAD, 1, 2], **BODY)
        stream = pool.submit(served.post, prompt=[BAD, 3, 4], stream=True, **BODY)
    assert [call.result().json()["choices"] for call in fine] == [expected] * 2
    assert whole.result().status_code == 500
    *frames, last, end = stream.result().text.split("\n\n")
    assert frames, "two tokens came before the fault"
    assert end == ""
    for error in (whole.result().json()["error"], json.loads(last.removeprefix("data: "))["error"]):
        assert error["code"] == "internal_error"
        assert "secret" not in error["message"]
    assert served.get("/health").status_code == 200
    assert eventually(served.idle)
    assert served.metrics()["requests_total{outcome=error}"] == 2
    assert served.metrics()["requests_total{outcome=ok}"] == 3
