"""The codec that knows every wire type."""

from shared.messages import kv, load, placement, predict, requests, tokens, workers
from shared.messages.base import ErrorReply, MessageCodec

CODEC = MessageCodec(
    (
        ErrorReply,
        requests.SubmitRequest,
        requests.SubmitReply,
        requests.CloseRequest,
        requests.Done,
        requests.AttemptPlaced,
        requests.AttemptLost,
        requests.LeaderChanged,
        requests.SnapshotRequest,
        requests.GatewaySnapshot,
        workers.ReserveKV,
        workers.KVReserved,
        workers.StartBatch,
        workers.AbortRequests,
        workers.WorkerSnapshot,
        workers.HandoffTrailer,
        workers.PrefillFinished,
        workers.TransferFinished,
        workers.AttemptEnded,
        tokens.TokenBatch,
        tokens.TokensSince,
        tokens.TokensSinceReply,
        tokens.AckTokens,
        load.WorkerReport,
        load.ServiceReport,
        load.InstanceExited,
        load.Drain,
        kv.LookupPrefix,
        kv.PrefixFound,
        kv.GetBlocks,
        kv.PutBlocks,
        kv.PutAccepted,
        predict.PredictLength,
        predict.LengthPrediction,
        placement.GetPlacement,
        placement.Placement,
    )
)
