"""The main job through a client that openapi-python-client makes of the API's document: no warning may come of making it,
and whatever the service answers must be what the client expects. The client is made anew each time, and never kept."""

import importlib
import io
import json
import os
import pathlib
import subprocess
import sys
import time

SCRIPTS = pathlib.Path(__file__).resolve().parent
ROOT = SCRIPTS.parent.parent
PACKAGE = "promptweave_client"
JOB_TIMEOUT_S = 120
# More requests would not test the document better.
IMAGES = 32


def generate(url: str, folder: pathlib.Path) -> None:
    """Makes the package of the document that the service has, in `folder`, and lets it be imported."""
    tools = pathlib.Path(sys.executable).parent
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--url", f"{url}/openapi.json", "--meta", "none"]
    command += ["--config", str(SCRIPTS / "client.yml"), "--output-path", str(folder / PACKAGE), "--fail-on-warning"]
    # The generator formats its output with ruff, which is installed beside it.
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(command, check=True, env=os.environ | {"PATH": path}, stdout=sys.stderr)
    sys.path.insert(0, str(folder))


class Api:
    """The made client. An answer that is not of the type that was asked for ends the run."""

    def __init__(self, url: str, key: str):
        self.models = importlib.import_module(f"{PACKAGE}.models")
        self.types = importlib.import_module(f"{PACKAGE}.types")
        made = importlib.import_module(PACKAGE)
        self.client = made.AuthenticatedClient(base_url=url, token=key, timeout=60, raise_on_unexpected_status=True)

    def call(self, operation: str, expected: str, *path, **arguments):
        """`operation` is `tag.operation_id`, and `expected` the model that the answer must be."""
        module = importlib.import_module(f"{PACKAGE}.api.{operation}")
        answer = module.sync(*path, client=self.client, **arguments)
        kind = getattr(self.models, expected, None) or getattr(self.types, expected)
        if not isinstance(answer, kind):
            sys.exit(f"{operation} answered {answer}, and not a {expected}")
        return answer

    def file(self, path: pathlib.Path):
        return self.types.File(payload=io.BytesIO(path.read_bytes()))


def start_worker(promptweave: pathlib.Path, folder: pathlib.Path) -> subprocess.Popen:
    """Beside the service, whose blobs it shares."""
    own = folder / "worker"
    own.mkdir()
    (own / "blobs").symlink_to(folder / "blobs")
    command = [promptweave, "worker", "--device", "cpu", "--cache-gib", "0", "--data-dir", own]
    with open(own / "log", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def register(api: Api) -> None:
    """Backbone, images and two prompts, in a project that has nothing else."""
    models = api.models
    backbone = models.RegisterBackbone(name="vit-s14", directory="vit_s14_focus")
    api.call("backbones.register_backbone", "RegisteredBackbone", body=backbone)
    dataset = models.RegisterDataset(name="clipart", directory="target")
    api.call("datasets.register_dataset", "RegisteredDataset", body=dataset)
    for name in ("emoji", "fashion"):
        api.call("prompts.create_prompt", "DescribedPrompt", body=models.CreatePrompt(name=name))
        file = api.file(ROOT / "demo" / "prompts" / f"{name}.safetensors")
        version = api.call("prompts.publish_version", "PublishedVersion", name, body=file)
        if version.dtype != models.PromptDtype.F32:
            sys.exit(f"{name} is {version.dtype}")
    unknown = api.call("prompts.get_prompt", "ProblemDocument", "nothing")
    if unknown.code != models.ProblemCode.PROMPT_NOT_FOUND:
        sys.exit(f"the code is {unknown.code}")


def compose(api: Api, worker: subprocess.Popen):
    """Posts an ensemble, and waits until the worker has it done."""
    models = api.models
    body = models.CreateEnsemble(
        backbone="vit-s14",
        target=models.TargetObject(dataset="clipart", split=models.Split.TRAIN, max_samples=IMAGES),
        sources=["emoji", models.SourceObject(prompt="fashion")],
        output=models.Output(name="clipart-composed"),
    )
    plan = api.call("ensembles.validate_ensemble", "EnsemblePlan", body=body)
    ensemble = api.call("ensembles.create_ensemble", "Ensemble", body=body)
    if plan.spec_digest != ensemble.spec_digest:
        sys.exit("the plan is of another ensemble")
    over = (models.JobState.SUCCEEDED, models.JobState.FAILED, models.JobState.CANCELLED)
    deadline = time.monotonic() + JOB_TIMEOUT_S
    while ensemble.state not in over:
        if worker.poll() is not None:
            sys.exit("the worker has ended")
        if time.monotonic() > deadline:
            sys.exit(f"the ensemble is {ensemble.state} after {JOB_TIMEOUT_S} s")
        ensemble = api.call("ensembles.get_ensemble", "Ensemble", ensemble.id, wait=1)
    if ensemble.state != models.JobState.SUCCEEDED:
        sys.exit(f"the ensemble is {ensemble.state}: {ensemble.error}")
    return ensemble


def stream(api: Api, ensemble) -> list:
    """The events as the stream has them, each as its model."""
    address, accept = f"/v1/ensembles/{ensemble.id}/events", {"accept": "text/event-stream"}
    events, fields = [], {}
    with api.client.get_httpx_client().stream("GET", address, headers=accept) as answer:
        for line in answer.iter_lines():
            name, _, value = line.partition(": ")
            if line and name:
                fields[name] = json.loads(value) if name == "data" else value
            elif fields.get("id"):
                events.append(api.models.StreamedEvent.from_dict(fields))
            if not line:
                fields = {}
    return events


def read(api: Api, ensemble) -> None:
    result = api.call("ensembles.get_ensemble_result", "CompositionResult", ensemble.id)
    weights = {source.prompt: source.weight for source in result.source_weights}
    if set(weights) != {"emoji", "fashion"} or abs(sum(weights.values()) - 1) > 1e-6:
        sys.exit(f"the weights are {weights}")
    events = api.call("ensembles.list_ensemble_events", "Events", ensemble.id).items
    told = [(event.event, event.data.seq) for event in stream(api, ensemble)]
    if told != [(event.kind, event.seq) for event in events] or events[-1].kind != "succeeded":
        sys.exit(f"the stream told {told}, and the page has {events}")
    for file in (
        api.call("ensembles.get_ensemble_statistics", "File", ensemble.id),
        api.call("prompts.get_content", "File", "clipart-composed", "1"),
    ):
        start = file.payload.read(9)
        if start[8:] != b"{":
            sys.exit(f"a file begins with {start}, which is not safetensors")
    print(f"the generated client composed a prompt with the weights {weights}", flush=True)


def main_job(service, promptweave: pathlib.Path, key: str, folder: pathlib.Path) -> None:
    """All of it, in a project of its own."""
    print("\n=== a client made of the document", flush=True)
    generate(service.url, folder)
    operator = Api(service.url, key)
    body = operator.models.CreateProject(name="client")
    project = operator.call("projects.create_project", "NewProject", body=body)
    api = Api(service.url, project.api_key.key)
    register(api)
    worker = start_worker(promptweave, folder)
    try:
        read(api, compose(api, worker))
    except BaseException:
        print((folder / "worker" / "log").read_text(), file=sys.stderr)
        raise
    finally:
        worker.terminate()
        worker.wait()
