#!/usr/bin/env python3
"""What leaves this server is what other runtimes compute: adapters as GGUF in llama.cpp, merged directories in transformers.

    interchange.py llama        --model MODEL.gguf --adapters DIR --bin DIR    # with llama-cpp-python and gguf installed
    interchange.py transformers --model MODEL.gguf --adapters DIR --bin DIR    # with torch and transformers installed

DIR of --adapters holds PEFT directories; DIR of --bin holds espalierd and espalier. A server runs on the model, takes every adapter and
answers each prompt greedily. llama: the same adapter comes back as GGUF and runs on the base dequantised to an f32 GGUF, which reads our
tokens and must have chosen each of them itself, unless its own margin is below 0.05. transformers: `espalierd merge` writes the directory,
and its log-probabilities of the served tokens are the served ones within 1e-3. What cannot be had is said: 'not run: why'.
"""
import argparse, json, os, pathlib, subprocess, sys, tempfile, time

PROMPTS = ["The quarterly report was late because", "My customer asked for a refund, and", "A good database index", "Once upon a time"]
TOKENS, MARGIN, SAME, NEAR = 24, 0.05, 0.02, 1e-3
KEY = "interchange-of-adapters-and-models"


def not_run(why):
    print(f"not run: {why}")
    sys.exit(0)


def program(args, name):
    found = [path for path in (args.bin / name, args.bin / f"{name}-under-test") if path.is_file()]
    return max(found, key=os.path.getmtime) if found else not_run(f"no {name} in {args.bin}")


def served(name):
    """A directory's name as an adapter's, which has no underscore."""
    return name.replace("_", "-")


class Server:
    """espalierd on the model, with every adapter of the directory pushed."""

    def __init__(self, args, work):
        self.cli, self.work = program(args, "espalier"), work
        ready = work / "ready"
        daemon = [program(args, "espalierd"), "--model", args.model, "--dtype", "f32", "--listen", "127.0.0.1:0", "--metrics-listen", "off",
                  "--data-dir", work / "data", "--ready-file", ready, "--kv-cache-bytes", "256MiB", "--adapter-cache-bytes", "512MiB", "--service-key", KEY]
        self.process = subprocess.Popen([*daemon, "--log", "error"], stdout=subprocess.DEVNULL)
        while not (ready.exists() and ready.read_text().strip()):
            if self.process.poll() is not None:
                sys.exit("espalierd did not start")
            time.sleep(0.2)
        self.address = "http://" + ready.read_text().strip()
        self.run("tenants", "create", "acme")

    def run(self, *command, json_reply=False):
        flags = ["--server", self.address, "--key", KEY, "--tenant", "acme", "--timeout", "600"] + (["--json"] if json_reply else [])
        done = subprocess.run([self.cli, *flags, *map(str, command)], capture_output=True, text=True)
        return done

    def must(self, *command, **how):
        done = self.run(*command, **how)
        if done.returncode:
            sys.exit(f"{command}: {done.stderr}")
        return json.loads(done.stdout) if how.get("json_reply") else done.stdout

    def greedy(self, prompt, adapter):
        """The tokens, and the log-probability of each."""
        target = ["--adapter", served(adapter)] if adapter else []
        reply = self.must("generate", prompt, *target, "-m", TOKENS, "-t", 0, "--ignore-eos", "--no-stream", "--logprobs", json_reply=True)
        candidate = reply["candidates"][0]
        ids = candidate.get("token_ids") or candidate["tokenIds"]
        return ids, [entry.get("logprob", 0.0) for entry in candidate["logprobs"]]


def dequantised(model, out):
    """The base as a GGUF of f32 tensors, metadata and row order as they are."""
    import gguf
    reader = gguf.GGUFReader(model)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind, element = field.types[0], field.types[-1]
        writer.add_key_value(name, field.contents(), kind, element if kind == gguf.GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed([int(n) for n in tensor.shape]))))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama(args, server, names):
    import llama_cpp, numpy
    base = args.base or server.work / "base-f32.gguf"
    if not os.path.exists(base):
        dequantised(args.model, base)
    failed = 0
    for name in [None, *names]:
        file = None
        if name:
            file = server.work / f"{name}.gguf"
            done = server.run("adapters", "pull", served(name), file, "--format", "gguf")
            if done.returncode:
                print(f"{name}: refused: {done.stderr.strip().splitlines()[0]}")
                continue
        model = llama_cpp.Llama(str(base), lora_path=str(file) if file else None, n_ctx=512, logits_all=True, verbose=False, n_threads=2)
        equal, excused, wrong, worst, effect = 0, 0, 0, 0.0, 0.0
        for prompt in PROMPTS:
            (ours, logprobs), (plain, before) = server.greedy(prompt, name), server.greedy(prompt, None)
            effect = max(effect, max(abs(a - b) for a, b in zip(logprobs, before)) if ours == plain else float("inf"))
            ids = model.tokenize(prompt.encode(), add_bos=False)
            model.reset()
            model.eval(ids + ours[:-1])
            for row, token, logprob in zip(model.scores[len(ids) - 1 : len(ids) + len(ours) - 1], ours, logprobs):
                worst = max(worst, abs(float(row[token] - row.max() - numpy.log(numpy.exp(row - row.max()).sum())) - logprob))
                margin = float(row.max() - row[token])
                equal, excused, wrong = equal + (margin == 0), excused + (0 < margin < MARGIN), wrong + (margin >= MARGIN)
        print(f"{name or 'base'}: {equal} tokens equal, {excused} excused, {wrong} wrong; log-probabilities differ by {worst:.1e}, the base's by {effect:.1e}")
        # An adapter whose work drowns in what runtimes differ by would prove nothing.
        failed += wrong + (worst > SAME) + (name is not None and effect < 5 * worst)
        del model
    return failed


def transformers(args, server, names):
    import torch, transformers as hf
    torch.set_num_threads(2)
    failed = 0
    for name in names:
        out = server.work / f"{name}-merged"
        merge = [program(args, "espalierd"), "merge", "--model", args.model, "--adapter", args.adapters / name, "--out", out, "--dtype", "f32"]
        subprocess.run(merge, check=True, stdout=subprocess.DEVNULL)
        tokenizer = hf.AutoTokenizer.from_pretrained(out)
        config = json.loads((out / "config.json").read_text())
        classifier = "id2label" in config
        kind = hf.AutoModelForSequenceClassification if classifier else hf.AutoModelForCausalLM
        model, about = kind.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
        odd = [key for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if about[key]]
        worst, same = 0.0, 0
        for prompt in PROMPTS:
            ids = tokenizer(prompt, add_special_tokens=False).input_ids
            if classifier:
                reply = server.must("classify", prompt, "--adapter", served(name), json_reply=True)
                scores = reply["results"][0]["scores"] if "results" in reply else reply["scores"]
                with torch.no_grad():
                    logits = model.eval()(input_ids=torch.tensor([ids])).logits[0]
                for score in scores:
                    row = model.config.label2id[score["label"]]
                    worst = max(worst, abs(float(logits[row]) - score["score"]))
                same += model.config.id2label[int(logits.argmax())] == scores[0]["label"]
                continue
            ours, logprobs = server.greedy(prompt, name)
            with torch.no_grad():
                logits = model.eval()(input_ids=torch.tensor([ids + ours[:-1]])).logits[0, len(ids) - 1 :].log_softmax(-1)
            worst = max(worst, max(abs(float(row[token]) - p) for row, token, p in zip(logits, ours, logprobs)))
            same += [int(row.argmax()) for row in logits] == ours
        print(f"{name}: {config['architectures'][0]}, largest difference {worst:.1e}, {same} of {len(PROMPTS)} answers equal{', ' + str(odd) if odd else ''}")
        failed += worst > NEAR or bool(odd)
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runtime", choices=["llama", "transformers"])
    parser.add_argument("--model", required=True, help="the base as GGUF")
    parser.add_argument("--adapters", required=True, type=pathlib.Path)
    parser.add_argument("--bin", required=True, type=pathlib.Path)
    parser.add_argument("--base", help="the base as f32 GGUF, made when it is not there (llama)")
    args = parser.parse_args()
    for needed in {"llama": ["llama_cpp", "gguf"], "transformers": ["torch", "transformers"]}[args.runtime]:
        try:
            __import__(needed)
        except ImportError as error:
            not_run(f"{error}; {sys.executable} -m pip install {needed.replace('llama_cpp', 'llama-cpp-python')}")
    if not os.path.exists(args.model):
        not_run(f"no model {args.model}")
    names = sorted(path.parent.name for path in args.adapters.glob("*/adapter_config.json"))
    if not names:
        not_run(f"no adapters in {args.adapters}")
    with tempfile.TemporaryDirectory() as work:
        server = Server(args, pathlib.Path(work))
        try:
            for name in names:
                server.must("adapters", "push", args.adapters / name, "--adapter", served(name))
            failed = {"llama": llama, "transformers": transformers}[args.runtime](args, server, names)
        finally:
            server.process.kill()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
