"""huggingface_hub: chats through the OpenAI shape, whole and streamed, and text generation."""
# /// script
# dependencies = ["huggingface_hub>=2.4,<3"]
# ///

import sys

from huggingface_hub import InferenceClient

url, model = sys.argv[1:]
hello = [{"role": "user", "content": "the whale"}]
client = InferenceClient(base_url=url + "/v1", api_key="none")
answer = client.chat_completion(hello, model=model, max_tokens=12, seed=3, temperature=0.0)
assert answer.usage.completion_tokens > 0
pieces = list(client.chat_completion(hello, model=model, max_tokens=12, seed=3, temperature=0.0, stream=True))
assert "".join(c.choices[0].delta.content or "" for c in pieces if c.choices) == answer.choices[0].message.content

texts = InferenceClient(model=f"{url}/hf/text-generation/{model}", token="none")
whole = texts.text_generation("the whale", max_new_tokens=12, do_sample=False)
details = texts.text_generation("the whale", max_new_tokens=12, do_sample=False, details=True)
assert details.generated_text == whole and details.details.generated_tokens == 12
streamed = list(texts.text_generation("the whale", max_new_tokens=12, do_sample=False, stream=True))
assert "".join(streamed) == whole
