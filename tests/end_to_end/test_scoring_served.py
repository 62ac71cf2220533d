"""`/get_ppl` and `/terminate` of a real server."""

import signal

import pytest
import requests
import torch
from transformers import AutoModelForCausalLM

from tests.server_process import server_process
from tests.tiny_models import write_tiny


@pytest.mark.full
def test_a_client_ends_a_server_that_allows_it_and_measures_the_references_perplexity(tmp_path) -> None:
    folder = write_tiny("llama", tmp_path / "llama")
    token_ids = list(range(20, 60))
    with server_process(folder, "--allow-terminate-by-client") as server:
        ppl = requests.post(f"{server.url}/get_ppl", json={"input": token_ids}, timeout=60).json()["ppl"]
        assert requests.get(f"{server.url}/terminate", timeout=10).status_code == 200
        assert server.process.wait(30) in (0, -signal.SIGTERM)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        loss = model(torch.tensor([token_ids]), labels=torch.tensor([token_ids])).loss.item()
    assert abs(ppl - loss) < 1e-5
