from trainmaster.client import Client as Client
from trainmaster.client import TrainmasterError as TrainmasterError
