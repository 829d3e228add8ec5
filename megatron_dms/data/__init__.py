"""From text and chats to the samples of a training step."""
