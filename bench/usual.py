"""The operations measured, the usual way: a sync SQLModel session for each request."""

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any
from uuid import UUID, uuid4

import jwt
from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlmodel import DateTime, Field, Index, Session, SQLModel, col, create_engine, select

URL = os.environ["DATABASE_URL"].replace("postgresql://", "postgresql+psycopg://")
# More connections, up to one for each of Starlette's 40 threads, made it no faster.
engine = create_engine(URL, pool_size=10, max_overflow=0)
app = FastAPI()
now = partial(datetime.now, UTC)


class TaskCreate(SQLModel):
    title: str = Field(min_length=1, max_length=500)
    description: str | None = Field(default=None, max_length=5000)
    completed: bool = False


class Task(TaskCreate, table=True):
    __tablename__ = "tasks"
    __table_args__ = (Index("tasks_user_id_created_at", "user_id", "created_at"),)

    id: UUID = Field(default_factory=uuid4, primary_key=True)
    user_id: str
    created_at: datetime = Field(default_factory=now, sa_type=DateTime(timezone=True))
    updated_at: datetime = Field(default_factory=now, sa_type=DateTime(timezone=True))


def get_session() -> Iterator[Session]:
    with Session(engine) as session:
        yield session


def current_user(bearer: Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]) -> str:
    return str(jwt.decode(bearer.credentials, os.environ["JWT_SECRET"], ["HS256"])["sub"])


SQLModel.metadata.create_all(engine)
Database = Annotated[Session, Depends(get_session)]
User = Annotated[str, Depends(current_user)]


@app.get("/tasks", response_model=list[Task])
def list_tasks(session: Database, user: User, limit: int = 1000) -> Any:
    newest_first = select(Task).order_by(col(Task.created_at).desc()).limit(limit)
    return session.exec(newest_first.where(Task.user_id == user)).all()


@app.get("/tasks/{task_id}", response_model=Task)
def get_task(session: Database, user: User, task_id: UUID) -> Any:
    task = session.get(Task, task_id)
    if task is None or task.user_id != user:
        raise HTTPException(404, "Task not found")
    return task


@app.post("/tasks", response_model=Task, status_code=201)
def create_task(session: Database, user: User, body: TaskCreate) -> Any:
    task = Task.model_validate(body, update={"user_id": user})
    session.add(task)
    session.commit()
    session.refresh(task)
    return task


@app.patch("/tasks/{task_id}/toggle", response_model=Task)
def toggle_task(session: Database, user: User, task_id: UUID) -> Any:
    task = get_task(session, user, task_id)
    task.completed, task.updated_at = not task.completed, now()
    session.commit()
    session.refresh(task)
    return task
