"""`transformers chat`, pointed at the URL: what a person types, and an answer on the screen."""

import subprocess
import sys
from pathlib import Path

url, model = sys.argv[1:]
command = [Path(sys.executable).parent / "transformers", "chat", model, url, "max_new_tokens=12", "do_sample=False"]
typed = "the whale\nn\n!exit\n"  # "n": don't continue after the token limit
done = subprocess.run(command, input=typed, capture_output=True, text=True, timeout=120, check=False)
assert done.returncode == 0, done.stdout + done.stderr
assert f"<{model}>:" in done.stdout and "token limit" in done.stdout, done.stdout
