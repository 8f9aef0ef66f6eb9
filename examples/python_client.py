"""Asks a running espalierd; run from the repository's root: python examples/python_client.py tenants/acme/adapters/tickets "Where is my parcel?" """
import os, sys
import grpc  # pip install grpcio grpcio-tools

sys.path.insert(0, "proto")
api, services = grpc.protos_and_services("espalier/v1/inference.proto")
adapter, text = sys.argv[1:3]
channel = grpc.insecure_channel(os.environ.get("ESPALIER_SERVER", "127.0.0.1:7411").removeprefix("http://"))
inference = services.InferenceServiceStub(channel)
key = os.environ.get("ESPALIER_API_KEY")
call = dict(timeout=30, metadata=[("authorization", f"Bearer {key}")] if key else None)
try:
    reply = inference.Classify(api.ClassifyRequest(target={"adapters": [{"adapter": adapter}]}, texts=[text]), **call)
    print(f"{reply.results[0].label} ({reply.results[0].scores[0].probability:.2f}) by {reply.effective.adapters[0].version}")
except grpc.RpcError as error:
    sys.exit(f"{error.code().name}: {error.details()}")
