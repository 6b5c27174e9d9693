"""What more than one service needs. Nothing here imports ``services``."""
