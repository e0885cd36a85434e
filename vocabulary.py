"""GPT-2's vocabulary, from tiktoken: for text that becomes tokens, and for the prefixes of tokens."""
import threading


def gpt2(timeout: float = 60):
    """tiktoken's encoding. OSError where it cannot get the vocabulary in `timeout` seconds."""
    loaded = []

    def load():
        try:
            import tiktoken
            loaded.append(tiktoken.get_encoding("gpt2"))
        except Exception as error:  # noqa: BLE001 (requests, ssl and tiktoken raise what they like)
            loaded.append(error)

    # tiktoken downloads without a timeout; a daemon thread may be left behind
    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(timeout)
    encoding = loaded[0] if loaded else TimeoutError(f"no answer in {timeout} s")
    if isinstance(encoding, Exception):
        raise OSError(f"tiktoken cannot get GPT-2's vocabulary ({type(encoding).__name__}: {' '.join(str(encoding).split())[:120]}); "
                      "go online once, set TIKTOKEN_CACHE_DIR to a folder that has it, or use single bytes (--bytes)") from encoding
    return encoding
