"""The jobs that kernels are compared on, and the logits that they do them with."""

ROWS, VOCAB_SIZE = 8192, 128256
OURS = "kl_kernels"

LOGPROB, KL, BACKWARD = "log-probability", "exact KL", "gradient"
JOBS = {  # in the order of tables and pictures
    LOGPROB: "Reading the policy's logits: log-probability, loss or entropy",
    KL: "Reading the policy's and the reference's logits: an exact KL",
    BACKWARD: "Writing the gradient of the logits",
}
