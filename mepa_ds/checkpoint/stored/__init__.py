"""What a checkpoint's files hold, read as the bytes that they are: nothing of them is executed."""
